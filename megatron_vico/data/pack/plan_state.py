"""Where a run is in its data, and what that belongs to: a few hundred bytes in a checkpoint.

The state is the same for every number of ranks, workers, steps prefetched and packs a step. It
means something only for the order and packing that it was counted in, so these travel with it and
are compared when a run is resumed.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron_vico.errors import CheckpointError

PACKER_VERSION = 1
"""Raised whenever the same shards and options give other packs than before (data/pack/order.py,
data/pack/packing.py)."""


@dataclass(frozen=True, kw_only=True)
class PlanInputs:
    """All that the packs of a run follow from."""

    folders: tuple[str, ...]
    """The first 8 hex digits of each index's fingerprint."""

    repeats: tuple[float, ...]
    """How often each folder comes in an epoch."""

    seed: int
    seq_length: int
    max_tiles_per_pack: int
    max_samples_per_pack: int | None
    packing_window: int
    shuffle_shards: int

    tokens_per_tile: int
    """In the uncompressed stream, in which packs are counted."""

    packer_version: int = PACKER_VERSION

    def changes(self, now: "PlanInputs", *, paths: tuple[str, ...]) -> list[str]:
        """How this differs from `now` in a run with folders at `paths`, in clauses for the user."""
        found = []
        if len(self.folders) != len(now.folders):
            found.append(f"--data-path had {len(self.folders)} folders, now {len(now.folders)}")
        else:
            found += [
                f"the shards of {path} changed"
                for path, a, b in zip(paths, self.folders, now.folders, strict=True)
                if a != b
            ]
            found += [
                f"{path} came {a:g} times an epoch, now {b:g}"
                for path, a, b in zip(paths, self.repeats, now.repeats, strict=True)
                if a != b
            ]
        names = {"tokens_per_tile": "tokens per tile", "packer_version": "the version of packing"}
        for field in fields(self):
            before, after = getattr(self, field.name), getattr(now, field.name)
            if field.name not in ("folders", "repeats") and before != after:
                name = names.get(field.name, "--" + field.name.replace("_", "-"))
                found.append(f"{name} was {before}, now {after}")
        return found


@dataclass(frozen=True, kw_only=True)
class PlanState:
    """The next pack of a run."""

    epoch: int
    section: int
    """Of the epoch; a section is packed by itself, so that resuming packs no more than one."""

    pack: int
    """Packs taken of the section."""

    consumed_packs: int
    """Packs taken in the whole run."""

    inputs: PlanInputs

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "PlanState":
        """From `to_dict`'s result, or what JSON made of it; CheckpointError for anything else."""
        try:
            inputs = dict(content["inputs"])
            inputs |= {name: tuple(inputs[name]) for name in ("folders", "repeats")}
            return cls(**{**content, "inputs": PlanInputs(**inputs)})
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"state of the data {content}: not what this version writes ({error!r}); load a"
                " checkpoint of this version, or begin a new run from its weights with"
                " --pretrained-checkpoint."
            ) from error
