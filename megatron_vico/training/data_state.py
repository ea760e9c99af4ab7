"""What every rank knows of a run's data: its place in the order of packs, and the broken samples of
all readers."""

from dataclasses import dataclass
from typing import Any

import torch

from megatron_vico.data.load.error_budget import ErrorBudget, SkipList
from megatron_vico.data.load.loader import Loader
from megatron_vico.training.metrics import StepFigures


@dataclass(frozen=True, kw_only=True)
class DataState:
    """A replica's reader, on its first rank, and the error budget, which is the same on all
    ranks."""

    loader: Loader | None
    budget: ErrorBudget

    @classmethod
    def of(
        cls, loader: Loader | None, *, max_skipped_share: float, restored: dict[str, Any] | None
    ) -> "DataState":
        """Args: restored: what `to_state` gave at the checkpoint that the run goes on from; None, a
        new run."""
        budget = ErrorBudget(max_share=max_skipped_share)
        if restored is not None:
            budget.seen, budget.skipped = restored["seen"], len(restored["skipped"])
        return cls(loader=loader, budget=budget)

    def count(self, figures: StepFigures) -> None:
        """Count a step; called by every rank.

        Args:
            figures: over all ranks, so that all come to the same decision without asking each
                other.

        Raises:
            SampleError: on every rank, if more samples are broken than the budget allows.
        """
        self.budget.seen += figures.samples
        self.budget.skipped += figures.skipped
        if self.budget.exceeded:
            everyones = self._merge().skips
            # Less may be left of them: one that two ranks met counts once.
            if self.budget.exceeded:
                raise self.budget.error(everyones)

    def to_state(self) -> dict[str, Any]:
        """For a checkpoint, the same on every rank: numbers and strings; called by every rank."""
        reader = self._merge()
        return {"plan": reader.plan, "skipped": reader.skips.to_state(), "seen": self.budget.seen}

    def _merge(self) -> "_Reader":
        """Ask all readers, and let each know what the others found."""
        mine = self.loader
        told: list[_Reader | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(
            told,
            (
                None
                if mine is None
                else _Reader(plan=mine.place.to_dict(), skips=mine.skips, begun=mine.begun_packs)
            ),
        )
        readers = [each for each in told if each is not None]
        begun = max(each.begun for each in readers)
        everyones = SkipList.merged([each.skips for each in readers], from_pack=begun)
        self.budget.skipped = len(everyones)
        if mine is not None:
            mine.skips = everyones
        return _Reader(plan=readers[0].plan, skips=everyones, begun=begun)


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """What a loader tells the other ranks."""

    plan: dict[str, Any]
    """Its place; the same for all."""

    skips: SkipList
    begun: int
    """Packs of the run that its workers have begun."""
