"""A rank's packed batches, one list a step, prepared ahead by worker processes.

Data-parallel ranks share the packs of a step by their estimated cost (data/balance.py), as many for each. The only
state is the number of consumed steps.
"""

import itertools
import signal
from collections.abc import Iterator

from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_vico.config.schema import DataOptions
from megatron_vico.data import parcel
from megatron_vico.data.balance import assign
from megatron_vico.data.encoding import SampleEncoder
from megatron_vico.data.mixture import read_mixture
from megatron_vico.data.pack_builder import PackBuilder
from megatron_vico.data.pack_plan import FolderList, PackPlan, StepPlan
from megatron_vico.data.samples import EncodedSample, PackedBatch
from megatron_vico.data.storage import StorageOptions
from megatron_vico.data.webdataset import ShardFolder
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.vico import compression_plan

PREFETCH_STEPS = 2


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
        self.end_step = end_step
        self._num_workers = num_workers
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
        steps = _Steps(self.plan, start=self.consumed_steps, end=self.end_step)
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
        return itertools.islice(self._plan.steps(), self._start, self._end)


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
            samples = [self._encode(*sample) for sample in zip(pack.sample_ids, pack.visits, strict=True)]
            batches.append(
                self._builder.build(samples, pack=pack, samples_in_global_batch=step.num_samples, position=number)
            )
        return batches

    def _encode(self, sample_id: int, visit: int) -> EncodedSample:
        folder, number = self._data.locate(sample_id)
        random = compression_plan.generator(self._builder.seed, visit, sample_id, "augment")
        encoded = self._encoder.encode(folder.read(number), random=random)
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
    mixture = read_mixture(options.data_path)
    plan = PackPlan(
        [ShardFolder.open(each.path, storage=StorageOptions.of(options)) for each in mixture],
        repeats=[each.repeat for each in mixture],
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
