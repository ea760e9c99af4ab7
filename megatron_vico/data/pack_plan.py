"""Which packs each step has: a pure function of (shards, options, seed, step), worked out from indexes alone.

It is the same for every rank, worker count and restart. The packs of one epoch follow those of the one before, so that
an epoch may end inside a step: nothing is dropped, and each sample comes once an epoch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vico.config.schema import DataOptions
from megatron_vico.data.balance import EQUAL_COST, PackCost
from megatron_vico.data.packing import PackLimits, global_order, iter_packs
from megatron_vico.data.samples import IntArray
from megatron_vico.data.webdataset import ShardFolder
from megatron_vico.errors import ConfigError, SampleError


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Samples that share a microbatch."""

    sample_ids: tuple[int, ...]
    """Indices into the data set (all folders, one after the other)."""

    visits: tuple[int, ...]
    """How often each of them came before in this run: the epoch, unless an epoch has a sample more than once. What is
    drawn for a sample (plans, augmentation) is seeded by (seed, visit, sample id)."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The packs of one optimizer step, over all ranks."""

    step: int
    packs: tuple[Pack, ...]

    costs: tuple[float, ...]
    """Estimated FLOPs of each pack."""

    @property
    def num_samples(self) -> int:
        """Samples in the global batch."""
        return sum(len(pack.sample_ids) for pack in self.packs)


class FolderList:
    """Several folders as one data set, numbered one after the other."""

    def __init__(self, folders: Sequence[ShardFolder]) -> None:
        """Args: folders: in order."""
        self.folders = tuple(folders)
        self._starts = np.cumsum([0] + [len(folder) for folder in folders])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, sample_id: int) -> tuple[ShardFolder, int]:
        """The folder of a sample, and its number there."""
        folder = int(np.searchsorted(self._starts, sample_id, side="right")) - 1
        return self.folders[folder], sample_id - int(self._starts[folder])


class PackPlan:
    """Which packs each step has; reads indexes only."""

    def __init__(
        self,
        folders: Sequence[ShardFolder],
        *,
        options: DataOptions,
        tokens_kept: int,
        seed: int,
        global_batch_size: int,
        cost: PackCost = EQUAL_COST,
    ) -> None:
        """Check that every sample fits into a pack.

        Args:
            folders: read as one data set.
            options: limits of a pack, and the packing window.
            tokens_kept: visual tokens of a tile that is not compressed.
            seed: the run's seed.
            global_batch_size: packs of a step.
            cost: what a pack costs the rank that gets it.

        Raises:
            ConfigError: if there is no sample.
            SampleError: if a sample is larger than a pack; names it.
        """
        self.data = FolderList(folders)
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.cost = cost
        self.window = options.packing_window
        self.limits = PackLimits(
            capacity=options.seq_length, max_tiles=options.max_tiles_per_pack, max_samples=options.max_samples_per_pack
        )
        self.num_samples = len(self.data)
        if not self.num_samples:
            raise ConfigError("--data-path: no samples; give at least one folder of shards.")
        self.num_tiles: IntArray = np.concatenate([folder.num_tiles for folder in folders])
        num_tokens = np.concatenate([folder.num_tokens for folder in folders])
        self.lengths: IntArray = num_tokens + (tokens_kept - 1) * self.num_tiles
        self._check_limits()
        self._packs: Iterator[Pack] = iter(())
        self._next_step = 0
        self._rewind()

    def epoch(self, epoch: int) -> Iterator[Pack]:
        """All packs of one epoch, packed window by window as they are taken."""
        order = global_order(self.num_samples, seed=self.seed, epoch=epoch)
        lengths, tiles = self.lengths[order].tolist(), self.num_tiles[order].tolist()
        for positions in iter_packs(lengths, tiles=tiles, limits=self.limits, window=self.window):
            ids = tuple(int(order[position]) for position in positions)
            yield Pack(sample_ids=ids, visits=(epoch,) * len(ids))

    def step(self, step: int) -> StepPlan:
        """The packs of a step; cheap in ascending order, packs all that is before it otherwise (1 s a million samples).

        Args:
            step: from 0.

        Returns:
            `global_batch_size` packs.
        """
        if step < self._next_step:
            self._rewind()
        while self._next_step < step:
            self._take()
        packs = self._take()
        return StepPlan(step=step, packs=packs, costs=tuple(self._flops(pack) for pack in packs))

    def _flops(self, pack: Pack) -> float:
        ids = list(pack.sample_ids)
        return self.cost.flops(self.lengths[ids].tolist(), tiles=self.num_tiles[ids].tolist())

    def _take(self) -> tuple[Pack, ...]:
        self._next_step += 1
        return tuple(next(self._packs) for _ in range(self.global_batch_size))

    def _rewind(self) -> None:
        self._packs = self._all_packs()
        self._next_step = 0

    def _all_packs(self) -> Iterator[Pack]:
        epoch = 0
        while True:
            yield from self.epoch(epoch)
            epoch += 1

    def _check_limits(self) -> None:
        too_large = (self.lengths > self.limits.capacity) | (self.num_tiles > self.limits.max_tiles)
        if too_large.any():
            worst = int(np.flatnonzero(too_large)[0])
            folder, number = self.data.locate(worst)
            raise SampleError(
                f"sample {folder.describe(number).key!r} of {folder.path}: {self.lengths[worst]} tokens (uncompressed) "
                f"and {self.num_tiles[worst]} tiles, but a pack holds {self.limits.capacity} and "
                f"{self.limits.max_tiles} ({int(too_large.sum())} such samples); raise --seq-length or "
                "--max-tiles-per-pack, lower --max-dynamic-patch, or remove them."
            )
