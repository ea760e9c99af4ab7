"""Broken samples: each leaves a gap in its pack and is counted by cause; too many end the run.

A gap is one token that nothing is trained on, without tiles. The plan of packs, the weights of the
other samples and their compression plans stay as they are, so every rank and every resumed run
stays in step.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

from megatron_vico.data.samples import Skipped
from megatron_vico.errors import SampleError

MIN_SAMPLES = 10_000
"""Samples that a run counts as seen from its first step on: with a share of 0.001, ten broken
samples are within the budget at any time, so that one among the first hundred ends no run, and the
eleventh of a missing folder does."""

_SHOWN_KEYS = 3


class SkipList:
    """The broken samples of a run by their number; a sample that comes again counts once."""

    def __init__(self, skipped: Iterable[Skipped] = ()) -> None:
        """Args: skipped: the first of those with the same number stays."""
        self._by_id: dict[int, Skipped] = {}
        for each in skipped:
            self.add(each)

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Skipped]:
        return iter(self._by_id.values())

    def add(self, skipped: Skipped) -> bool:
        """Note a sample; returns whether it was not noted before."""
        return self._by_id.setdefault(skipped.sample_id, skipped) is skipped

    def leaves_out(self, sample_id: int, *, pack: int) -> bool:
        """Whether the sample is left out of this pack of the run (from 0) without being read."""
        noted = self._by_id.get(sample_id)
        return noted is not None and noted.from_pack is not None and pack >= noted.from_pack

    @classmethod
    def merged(cls, lists: Iterable["SkipList"], *, from_pack: int) -> Self:
        """The lists of all readers as one; from `from_pack` on nobody reads again what is in it.

        A rank whose workers have begun a pack cannot leave out of it what another rank found, so
        `from_pack` is one that no rank has begun; it is part of the state, and a resumed run reads
        and leaves out the same.
        """
        # What was agreed on before comes first, and so stays.
        of_all_readers = sorted(
            (each for one in lists for each in one),
            key=lambda each: (each.sample_id, each.from_pack is None),
        )
        return cls(
            each if each.from_pack is not None else replace(each, from_pack=from_pack)
            for each in of_all_readers
        )

    def to_state(self) -> list[list[Any]]:
        """For a checkpoint: numbers and strings, without the errors' texts."""
        return [[each.sample_id, each.key, each.cause, each.from_pack] for each in self]

    @classmethod
    def from_state(cls, state: list[list[Any]]) -> Self:
        """The list that `to_state` was called on."""
        names = ("sample_id", "key", "cause", "from_pack")
        return cls(Skipped(**dict(zip(names, each, strict=True))) for each in state)

    def table(self) -> str:
        """A line for each cause: how many, and the first few keys."""
        lines = [f"{'samples':>8}  {'cause':16}  keys"]
        for cause, count in Counter(each.cause for each in self).most_common():
            keys = [repr(each.key) for each in self if each.cause == cause]
            shown = ", ".join(keys[:_SHOWN_KEYS]) + (", ..." if count > _SHOWN_KEYS else "")
            lines.append(f"{count:8}  {cause:16}  {shown}")
        return "\n".join(lines)


@dataclass(kw_only=True)
class ErrorBudget:
    """How many samples may be broken; the same numbers on every rank."""

    max_share: float
    """Largest share of broken samples among those seen (`--max-skipped-share`)."""

    seen: int = 0
    """Samples of all steps so far, each as often as it came."""

    skipped: int = 0
    """Broken ones among them. Until the ranks' lists are merged, one that two ranks met counts
    twice."""

    @property
    def exceeded(self) -> bool:
        """Whether the run has to stop."""
        return self.skipped > self.max_share * max(self.seen, MIN_SAMPLES)

    def error(self, skips: SkipList) -> SampleError:
        """What the run stops with."""
        return SampleError(
            f"{self.skipped} broken samples among {self.seen} seen, more than --max-skipped-share"
            f" {self.max_share} of at least {MIN_SAMPLES}; `vico shards verify` names them all."
            " Correct the shards, or raise the share.\n" + skips.table()
        )
