"""Which packs each step has: a pure function of (indexes, options, seed) and the state of the run.

It is the same for every rank, worker count and restart. The packs of one epoch follow those of the
one before, so that an epoch may end inside a step: nothing is dropped. An epoch is packed in
sections, each by itself.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_vico.config.schema import DataOptions
from megatron_vico.data.pack.balance import EQUAL_COST, PackCost
from megatron_vico.data.pack.order import EpochOrder
from megatron_vico.data.pack.packing import PackLimits, iter_packs
from megatron_vico.data.pack.plan_state import PlanInputs, PlanState
from megatron_vico.data.samples import IntArray
from megatron_vico.data.shards.reader import ShardFolder
from megatron_vico.errors import ConfigError, SampleError

SECTION_WINDOWS = 64
"""Windows packed with carry-over before all packs are closed, which leaves 0.02 % less fill than
never closing them."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Samples that share a microbatch."""

    sample_ids: tuple[int, ...]
    """Indices into the data set (all folders, one after the other)."""

    visits: tuple[int, ...]
    """How often each of them came before in this run: the epoch, unless an epoch has a sample more
    than once. What is drawn for a sample (plans, augmentation) is seeded by (seed, visit, sample
    id)."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The packs of one optimizer step, over all ranks."""

    packs: tuple[Pack, ...]

    costs: tuple[tuple[float, ...], ...]
    """Estimated FLOPs of each sample of each pack."""

    after: PlanState
    """The state once the step is done."""

    @property
    def num_samples(self) -> int:
        """Samples in the global batch."""
        return sum(len(pack.sample_ids) for pack in self.packs)


class FolderList:
    """Several folders as one data set, numbered one after the other."""

    def __init__(self, folders: Sequence[ShardFolder]) -> None:
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
        repeats: Sequence[float] | None = None,
        options: DataOptions,
        tokens_kept: int,
        seed: int,
        global_batch_size: int,
        cost: PackCost = EQUAL_COST,
    ) -> None:
        """Check that every sample fits into a pack of `tokens_kept` visual tokens a tile.

        `repeats`: how often each folder comes in an epoch; None, once.

        Raises:
            ConfigError: if there is no sample.
            SampleError: if a sample is larger than a pack; names it.
        """
        self.data = FolderList(folders)
        self.options = options
        self.global_batch_size = global_batch_size
        self.cost = cost
        self.limits = PackLimits(
            capacity=options.seq_length,
            max_tiles=options.max_tiles_per_pack,
            max_samples=options.max_samples_per_pack,
        )
        self.num_samples = len(self.data)
        self.inputs = PlanInputs(
            folders=tuple(folder.index.fingerprint[:8] for folder in folders),
            repeats=tuple(map(float, repeats or (1.0,) * len(folders))),
            seed=seed,
            seq_length=options.seq_length,
            max_tiles_per_pack=options.max_tiles_per_pack,
            max_samples_per_pack=options.max_samples_per_pack,
            packing_window=options.packing_window,
            shuffle_shards=options.shuffle_shards,
            tokens_per_tile=tokens_kept,
        )
        self.samples_per_epoch = sum(
            len(folder) * r for folder, r in zip(folders, self.inputs.repeats, strict=True)
        )
        if self.samples_per_epoch < 1:
            raise ConfigError(
                f"no samples ({self.samples_per_epoch:g} an epoch) in"
                f" {', '.join(str(folder.path) for folder in folders)}; give at least one folder of"
                " shards, and larger repeats if they are fractions."
            )
        self.num_tiles: IntArray = np.concatenate([folder.num_tiles for folder in folders])
        num_tokens = np.concatenate([folder.num_tokens for folder in folders])
        self.lengths: IntArray = num_tokens + (tokens_kept - 1) * self.num_tiles
        self._check_limits()

    @property
    def start(self) -> PlanState:
        """The state of a run that has not begun."""
        return PlanState(epoch=0, section=0, pack=0, consumed_packs=0, inputs=self.inputs)

    def steps(self, state: PlanState | None = None) -> Iterator[StepPlan]:
        """The steps of a run, without end, `global_batch_size` packs each.

        They go on from a state, counted with any number of packs a step; None, they begin.

        Raises:
            ConfigError: if the state belongs to other data, and `options.override_data_state` is
                not set; names what differs. Where it is set, the run goes on at the same place of
                the new order, or at the next section if that place is beyond its section's end.
        """
        state = state or self.start
        changes = state.inputs.changes(
            self.inputs, paths=tuple(str(folder.path) for folder in self.data.folders)
        )
        if changes and not self.options.override_data_state:
            raise ConfigError(
                "--load: the checkpoint's place in the data belongs to other packs:"
                f" {'; '.join(changes)}. Undo that, or go on at the same place of the new order"
                " with --override-data-state (samples may then come twice or not at all in this"
                " epoch)."
            )
        return self._steps(replace(state, inputs=self.inputs))

    def epoch(self, epoch: int) -> Iterator[Pack]:
        """All packs of one epoch, packed window by window as they are taken."""
        order = self._order(epoch)
        return itertools.chain.from_iterable(
            self._section(order, i) for i in range(self._num_sections(order))
        )

    def _steps(self, state: PlanState) -> Iterator[StepPlan]:
        packs_on = self._packs(state)
        while True:
            packs, states = zip(*itertools.islice(packs_on, self.global_batch_size), strict=True)
            costs = tuple(tuple(map(self._flops, pack.sample_ids)) for pack in packs)
            yield StepPlan(packs=packs, costs=costs, after=states[-1])

    def _packs(self, state: PlanState) -> Iterator[tuple[Pack, PlanState]]:
        """The packs from a state on, each with the state after it."""
        start = state
        for epoch in itertools.count(start.epoch):
            order = self._order(epoch)
            first = start.section if epoch == start.epoch else 0
            for section in range(first, self._num_sections(order)):
                is_first = (epoch, section) == (start.epoch, start.section)
                taken = start.pack if is_first else 0
                packs = itertools.islice(self._section(order, section), taken, None)
                for number, pack in enumerate(packs, taken + 1):
                    state = replace(
                        state,
                        epoch=epoch,
                        section=section,
                        pack=number,
                        consumed_packs=state.consumed_packs + 1,
                    )
                    yield pack, state

    def _order(self, epoch: int) -> EpochOrder:
        return EpochOrder(
            [folder.samples_per_shard for folder in self.data.folders],
            repeats=self.inputs.repeats,
            seed=self.inputs.seed,
            epoch=epoch,
            block_shards=self.options.shuffle_shards,
        )

    def _num_sections(self, order: EpochOrder) -> int:
        return math.ceil(len(order) / (SECTION_WINDOWS * self.options.packing_window))

    def _section(self, order: EpochOrder, section: int) -> Iterator[Pack]:
        window = self.options.packing_window
        size = SECTION_WINDOWS * window
        ids, visits = order.slice(section * size, (section + 1) * size)
        lengths, tiles = self.lengths[ids].tolist(), self.num_tiles[ids].tolist()
        for members in iter_packs(lengths, tiles=tiles, limits=self.limits, window=window):
            chosen = list(members)
            yield Pack(
                sample_ids=tuple(ids[chosen].tolist()), visits=tuple(visits[chosen].tolist())
            )

    def _flops(self, sample_id: int) -> float:
        return self.cost.flops(int(self.lengths[sample_id]), tiles=int(self.num_tiles[sample_id]))

    def _check_limits(self) -> None:
        too_large = (self.lengths > self.limits.capacity) | (self.num_tiles > self.limits.max_tiles)
        if too_large.any():
            worst = int(np.flatnonzero(too_large)[0])
            folder, number = self.data.locate(worst)
            raised = [
                f"{flag} to {found}"
                for flag, found, most in (
                    ("--seq-length", self.lengths[worst], self.limits.capacity),
                    ("--max-tiles-per-pack", self.num_tiles[worst], self.limits.max_tiles),
                )
                if found > most
            ]
            fewer = ", lower --max-dynamic-patch" if self.num_tiles[worst] else ""
            raise SampleError(
                f"sample {folder.describe(number).key!r} of {folder.path}: {self.lengths[worst]}"
                f" tokens (uncompressed) and {self.num_tiles[worst]} tiles, but a pack holds"
                f" {self.limits.capacity} and {self.limits.max_tiles} ({int(too_large.sum())} such"
                f" samples); raise {' and '.join(raised)} or more{fewer}, or leave them out:"
                " `vico shards make` takes --seq-length and --max-tiles-per-pack too, and counts"
                " what it leaves out under --max-skipped-share."
            )
