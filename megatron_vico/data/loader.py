"""From shards to packed batches: which packs a step has, what is in a pack, and the iterator that a rank trains from.

The packs of a step are a pure function of (shards, options, seed, step): the same for every rank, worker count and
restart. Data-parallel ranks share the packs of a step by their estimated cost (data/balance.py), as many for each. The
packs of one epoch follow those of the one before, so that an epoch may end inside a step: nothing is dropped, and each
sample comes once an epoch. The only state is the number of consumed steps.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_vico.config.schema import DataOptions, Stage
from megatron_vico.data import parcel
from megatron_vico.data.balance import EQUAL_COST, PackCost, assign
from megatron_vico.data.encoding import SampleEncoder
from megatron_vico.data.image_tokens import expand_pack
from megatron_vico.data.packing import PackLimits, global_order, iter_packs
from megatron_vico.data.samples import EncodedSample, IntArray, PackedBatch, PolicyView
from megatron_vico.data.webdataset import ShardFolder
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.vico import compression_plan

PREFETCH_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Samples that share a microbatch."""

    epoch: int
    """Which pass over the data; part of the seed of compression plans."""

    sample_ids: tuple[int, ...]
    """Indices into the data set (all folders, one after the other)."""


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
            yield Pack(epoch=epoch, sample_ids=tuple(int(order[position]) for position in positions))

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
                f"sample {folder.keys[number]!r} of {folder.path}: {self.lengths[worst]} tokens (uncompressed) and "
                f"{self.num_tiles[worst]} tiles, but a pack holds {self.limits.capacity} and {self.limits.max_tiles} "
                f"({int(too_large.sum())} such samples); raise --seq-length or --max-tiles-per-pack, lower "
                "--max-dynamic-patch, or remove them."
            )


@dataclass(frozen=True, kw_only=True)
class PackBuilder:
    """Makes the packed batch of a stage from encoded samples."""

    stage: Stage
    seed: int
    tokens_kept: int
    tokens_compressed: int
    image_token_id: int
    xi_sampler: Literal["stratified", "bernoulli", "exact-count"] = "stratified"
    router_granularity: Literal["tile", "image"] = "tile"
    cost: PackCost = EQUAL_COST
    """What a pack of the stage costs, by which `make_loader` spreads the packs over data-parallel ranks."""

    def build(
        self, samples: Sequence[EncodedSample], *, pack: Pack, samples_in_global_batch: int, position: int = 0
    ) -> PackedBatch:
        """Pack samples: tiles, reference stream, and the stage's policy streams.

        Args:
            samples: encoded, in the order of `pack.sample_ids`.
            pack: their indices and epoch, which seed the compression plans.
            samples_in_global_batch: samples of the whole step, over all ranks and microbatches.
            position: the pack's place in the step.

        Returns:
            The batch, on the CPU.
        """
        rows_per_sample = np.array([int(sample.is_response.sum()) for sample in samples], dtype=np.int64)
        weights = 1.0 / (np.maximum(rows_per_sample, 1) * float(samples_in_global_batch))
        question, router_tile_sample = self._router_question(samples, pack)
        plans = self._plans(samples, pack, question)
        return PackedBatch(
            position=position,
            keys=tuple(sample.key for sample in samples),
            sample_ids=torch.tensor(pack.sample_ids, dtype=torch.int64),
            tiles=torch.from_numpy(np.concatenate([sample.tiles for sample in samples])),
            tiles_per_sample=tuple(sample.num_tiles for sample in samples),
            tiles_per_image=tuple(count for sample in samples for count in sample.tiles_per_image),
            sample_of_row=torch.from_numpy(np.repeat(np.arange(len(samples)), rows_per_sample)),
            labels=torch.from_numpy(np.concatenate([sample.labels for sample in samples])),
            kl_weight=torch.from_numpy(np.repeat(weights.astype(np.float32), rows_per_sample)),
            reference=self._view(samples, np.zeros_like(question)).stream,
            policies=tuple(self._view(samples, plan) for plan in plans),
            router_tiles=torch.from_numpy(np.flatnonzero(question)),
            router_tile_sample=router_tile_sample,
        )

    def _view(self, samples: Sequence[EncodedSample], plan: np.ndarray) -> PolicyView:
        stream = expand_pack(
            samples,
            plan=plan,
            tokens_kept=self.tokens_kept,
            tokens_compressed=self.tokens_compressed,
            image_token_id=self.image_token_id,
        )
        return PolicyView(compressed=torch.from_numpy(plan), stream=stream)

    def _plans(self, samples: Sequence[EncodedSample], pack: Pack, question: np.ndarray) -> tuple[np.ndarray, ...]:
        if self.stage == "pretrain":
            return ()
        if self.stage == "router":
            return (np.zeros_like(question), question)
        if self.xi_sampler == "stratified":
            # A sample comes once an epoch, so the first one names the pack; no other pack draws from this stream.
            random = compression_plan.generator(self.seed, pack.epoch, pack.sample_ids[0], "xi-of-pack")
            images = [count for sample in samples for count in sample.tiles_per_image]
            return (compression_plan.plan_stratified(images, generator=random).numpy(),)
        plans = []
        for sample, sample_id in zip(samples, pack.sample_ids, strict=True):
            random = compression_plan.generator(self.seed, pack.epoch, sample_id, "xi")
            plan = compression_plan.plan_fraction(sample.tiles_per_image, generator=random, sampler=self.xi_sampler)
            plans.append(plan.numpy())
        return (np.concatenate(plans),)

    def _router_question(self, samples: Sequence[EncodedSample], pack: Pack) -> tuple[np.ndarray, torch.Tensor]:
        """The plan of Eq. 2 over all tiles of the pack, and the local sample of each compressed tile."""
        plans = []
        for sample, sample_id in zip(samples, pack.sample_ids, strict=True):
            if self.stage != "router" or not sample.num_tiles:
                plans.append(np.zeros(sample.num_tiles, dtype=np.bool_))
                continue
            random = compression_plan.generator(self.seed, pack.epoch, sample_id, "router")
            if self.router_granularity == "image":
                plan = compression_plan.plan_one_image(sample.tiles_per_image, generator=random)
            else:
                plan = compression_plan.plan_one_tile(sample.num_tiles, generator=random)
            plans.append(plan.numpy())
        local = np.repeat(np.arange(len(plans)), [int(plan.sum()) for plan in plans])
        return np.concatenate(plans), torch.from_numpy(local)


class Loader:
    """This rank's packed batches, one list a step."""

    def __init__(
        self,
        plan: PackPlan,
        *,
        encoder: SampleEncoder,
        builder: PackBuilder,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_step: int = 0,
        end_step: int | None = None,
        num_workers: int = 0,
    ) -> None:
        """Check that the shards were indexed with this encoder.

        Args:
            plan: the packs of each step.
            encoder: tokenises and tiles.
            builder: packs for the stage.
            dp_rank: data-parallel rank.
            dp_size: data-parallel size.
            start_step: steps consumed before.
            end_step: step to stop before; None, never.
            num_workers: processes that prepare steps ahead; 0 prepares each step when it is asked for.

        Raises:
            ConfigError: if the packs of a step do not divide over the ranks, or tokenizer, model and index differ.
        """
        if plan.global_batch_size % dp_size:
            raise ConfigError(
                f"--global-batch-size {plan.global_batch_size} is not a multiple of the {dp_size} data-parallel "
                "ranks; choose one that is."
            )
        if builder.image_token_id != encoder.tokenizer.image_token_id:
            raise ConfigError(
                f"--tokenizer-model {encoder.tokenizer.source}: <IMG_CONTEXT> is {encoder.tokenizer.image_token_id}, "
                f"but the model expects {builder.image_token_id}; use the tokenizer that belongs to the model."
            )
        for folder in plan.data.folders:
            folder.check_encoding(tokenizer=encoder.tokenizer, settings=encoder.settings)
        self.plan = plan
        self.consumed_steps = start_step
        self._end_step, self._num_workers = end_step, num_workers
        self._dataset = _StepDataset(plan.data, encoder=encoder, builder=builder, dp_rank=dp_rank, dp_size=dp_size)

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        """Batches from step `consumed_steps` on; `consumed_steps` counts what was handed out.

        Raises:
            SampleError: if a sample cannot be read; the same in a worker as without workers.
        """
        for batches in self._steps():
            if isinstance(batches, SampleError):
                raise batches
            self.consumed_steps += 1
            yield batches

    def state_dict(self) -> dict[str, int]:
        """All that is needed to go on, on any number of ranks and workers."""
        return {"consumed_steps": self.consumed_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after the step of `state`; affects iterators made afterwards."""
        self.consumed_steps = int(state["consumed_steps"])

    def _steps(self) -> Iterator[list[PackedBatch] | SampleError]:
        steps = _Steps(self.plan, start=self.consumed_steps, end=self._end_step)
        if self._num_workers == 0:
            return (self._dataset[step] for step in steps)
        parcels = DataLoader(
            self._dataset,
            sampler=steps,
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=PREFETCH_STEPS,
            collate_fn=_parcel,  # runs in the worker
            worker_init_fn=_outlive_stop_signal,
        )
        return (sent if isinstance(sent, SampleError) else parcel.unwrap(sent) for sent in parcels)


def _outlive_stop_signal(worker: int) -> None:
    """SIGTERM asks the training process for a last checkpoint; schedulers send it to every process of a job.

    A worker that died of it would end the training process with an error before the checkpoint is written. Workers end
    when the training process tells them to, or is gone.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Steps(Sampler[StepPlan]):
    """Hands step plans to the workers, so that packing is done once, in the training process."""

    def __init__(self, plan: PackPlan, *, start: int, end: int | None) -> None:
        self._plan, self._start, self._end = plan, start, end

    def __iter__(self) -> Iterator[StepPlan]:
        step = self._start
        while self._end is None or step < self._end:
            yield self._plan.step(step)
            step += 1


class _StepDataset(Dataset[list[PackedBatch] | SampleError]):
    """Step plan -> this rank's packed batches, or what is wrong with them (torch would wrap an error in a worker)."""

    def __init__(
        self, data: FolderList, *, encoder: SampleEncoder, builder: PackBuilder, dp_rank: int, dp_size: int
    ) -> None:
        self._data = data
        self._encoder, self._builder = encoder, builder
        self._dp_rank, self._dp_size = dp_rank, dp_size

    def __getitem__(self, step: StepPlan) -> list[PackedBatch] | SampleError:
        try:
            return self._batches(step)
        except SampleError as error:
            return error

    def _batches(self, step: StepPlan) -> list[PackedBatch]:
        batches = []
        # The same on every rank: it follows from the index alone.
        for number in assign(step.costs, num_ranks=self._dp_size)[self._dp_rank]:
            pack = step.packs[number]
            samples = [self._encode(sample_id) for sample_id in pack.sample_ids]
            batches.append(
                self._builder.build(samples, pack=pack, samples_in_global_batch=step.num_samples, position=number)
            )
        return batches

    def _encode(self, sample_id: int) -> EncodedSample:
        folder, number = self._data.locate(sample_id)
        encoded = self._encoder.encode(folder.read(number))
        if encoded.token_ids.size != folder.num_tokens[number] or encoded.num_tiles != folder.num_tiles[number]:
            raise SampleError(
                f"sample {encoded.key!r}: {encoded.token_ids.size} tokens and {encoded.num_tiles} tiles, but the index "
                f"of {folder.path} says {folder.num_tokens[number]} and {folder.num_tiles[number]}; make the index "
                "anew with `vico shards index`."
            )
        return encoded


def make_loader(
    options: DataOptions,
    *,
    encoder: SampleEncoder,
    builder: PackBuilder,
    global_batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    start_step: int = 0,
    end_step: int | None = None,
) -> Loader:
    """Open the folders of `options.data_path` and make a rank's loader.

    Args:
        options: shards, packing, workers.
        encoder: tokenizer and tiling, those that the shards were indexed with.
        builder: the stage's pack builder; its seed also seeds the order.
        global_batch_size: packs of a step over all ranks.
        dp_rank: data-parallel rank.
        dp_size: data-parallel size.
        start_step: steps consumed before.
        end_step: step to stop before; None, never.

    Returns:
        The loader.

    Raises:
        ConfigError: if shards, tokenizer and options do not fit together.
        SampleError: if a shard is broken or a sample is larger than a pack.
    """
    plan = PackPlan(
        [ShardFolder.open(path) for path in options.data_path],
        options=options,
        tokens_kept=builder.tokens_kept,
        seed=builder.seed,
        global_batch_size=global_batch_size,
        cost=builder.cost,
    )
    return Loader(
        plan,
        encoder=encoder,
        builder=builder,
        dp_rank=dp_rank,
        dp_size=dp_size,
        start_step=start_step,
        end_step=end_step,
        num_workers=options.num_workers,
    )


def _parcel(batches: list[PackedBatch] | SampleError) -> parcel.Parcel | SampleError:
    return batches if isinstance(batches, SampleError) else parcel.wrap(batches)
