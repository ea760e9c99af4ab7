"""A rank's packs of each step as blocks of bytes, prepared ahead by worker processes.

Data-parallel ranks share the packs of a step by their estimated cost (data/pack/balance.py). The
state is the next pack of the plan and the broken samples
(data/load/error_budget.py): any number of ranks and workers goes on from it.
"""

import contextlib
import dataclasses
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from megatron_vico.config.schema import DataOptions
from megatron_vico.data.encode.sample_encoder import SampleEncoder
from megatron_vico.data.load import packed_bytes
from megatron_vico.data.load.error_budget import SkipList
from megatron_vico.data.load.packed_bytes import PackedBytes
from megatron_vico.data.load.worker_life import live_as_long_as_parent
from megatron_vico.data.pack.balance import Part, Sharing, share
from megatron_vico.data.pack.builder import PackBuilder
from megatron_vico.data.pack.plan import FolderList, Pack, PackPlan
from megatron_vico.data.pack.plan_state import PlanState
from megatron_vico.data.samples import EncodedSample, Gap, Skipped
from megatron_vico.data.shards.mixture import read_mixture
from megatron_vico.data.shards.reader import ShardFolder
from megatron_vico.errors import ConfigError, ReadingStopped, SampleError, WorkerError
from megatron_vico.vico import compression_plan

GAP_TOKEN_ID = 0
"""The one token of a gap: a text token of every tokenizer, the one that streams are padded with."""

POLL_S = 1.0
"""How often a waiting loader looks whether it is to stop."""

MAX_PIECES = 32
"""Pieces that a rank's packs of a step are prepared in: each takes one of the 1,024 files a process
may have open."""

UserError = SampleError | ConfigError
"""What a worker hands over as it is; torch would wrap it in a traceback."""


def open_plan(options: DataOptions, *, builder: PackBuilder, global_batch_size: int) -> PackPlan:
    """A run's packs from the folders of `options.data_path`, in the order of the builder's seed.

    Raises what `PackPlan` and `ShardFolder.open` do.
    """
    mixture = read_mixture(options.data_path, options=options)
    return PackPlan(
        [ShardFolder.open(each.path, options=options) for each in mixture],
        repeats=[each.repeat for each in mixture],
        options=options,
        tokens_kept=builder.tokens_kept,
        seed=builder.seed,
        global_batch_size=global_batch_size,
        cost=builder.cost,
    )


def _never() -> bool:  # no lambda: loaders are pickled
    return False


class Loader:
    """This rank's packs, one list of blocks a step."""

    def __init__(
        self,
        plan: PackPlan,
        *,
        encoder: SampleEncoder,
        builder: PackBuilder,
        dp_rank: int = 0,
        dp_size: int = 1,
        sharing: Sharing | None = None,
        num_steps: int | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Check that the shards were indexed with this encoder.

        Args:
            sharing: how the ranks must work together; None, each goes its own way.
            num_steps: steps to stop after; None, never.
            state: `state_dict` of the loader that this one goes on from.

        Raises:
            ConfigError: if the packs of a step do not divide over the ranks, or tokenizer, model
                and index differ.
        """
        if plan.global_batch_size % dp_size:
            raise ConfigError(
                f"--global-batch-size {plan.global_batch_size} is not a multiple of the {dp_size}"
                " data-parallel ranks; choose one that is."
            )
        for folder in plan.data.folders:
            folder.check_encoding(tokenizer=encoder.tokenizer, settings=encoder.settings)
        self.plan = plan
        self.plan_state, self.skips = plan.start, SkipList()
        """The next pack of the run, counting what was handed out; and the broken samples."""

        if state is not None:
            self.plan_state = PlanState.from_dict(state["plan"])
            self.skips = _still_here(SkipList.from_state(state["skipped"]), plan.data)
        self.num_steps = num_steps
        self.should_stop: Callable[[], bool] = _never
        """Asked while it waits for workers; True ends that with ReadingStopped."""

        self._dp_rank, self._dp_size, self._sharing = dp_rank, dp_size, sharing or Sharing()
        self._begun: deque[_Begun] = deque()
        self._begun_to = self.plan_state
        self._dataset = _PieceDataset(plan.data, encoder=encoder, builder=builder)

    def __iter__(self) -> Iterator[list[PackedBytes]]:
        """The steps from `plan_state` on.

        Raises:
            SampleError: if shard and index differ; the same in a worker as without workers.
            ConfigError: if a shard does not fit into the cache, or that cannot be written.
            WorkerError: if a worker died.
        """
        self._begun.clear()
        self._begun_to = self.plan_state
        prepared = self._prepared()
        while True:
            # Or half handed over, before torch noticed.
            with worker_death_explained(ConnectionError, EOFError):
                first = next(prepared, None)
                if first is None:
                    return
                begun = self._begun.popleft()
                step = [first, *itertools.islice(prepared, begun.num_pieces - 1)]
            self.plan_state = begun.after
            yield [self._without_known(block) for block in step]

    @property
    def begun_packs(self) -> int:
        """Packs of the run, over all ranks, that were handed out or given to workers."""
        return self._begun_to.consumed_packs

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on, on any number of ranks and workers: numbers and strings."""
        return {"plan": self.plan_state.to_dict(), "skipped": self.skips.to_state()}

    def _prepared(self) -> Iterator[PackedBytes]:
        options = self.plan.options
        if options.num_workers == 0:
            return (_unless_error(self._dataset[piece]) for piece in self._pieces())
        packs = self.plan.global_batch_size // self._dp_size
        ahead = options.prefetch_steps * min(packs, MAX_PIECES)
        prepared = DataLoader(
            self._dataset,
            sampler=self._pieces(),
            batch_size=None,
            num_workers=options.num_workers,
            prefetch_factor=math.ceil(ahead / options.num_workers),
            worker_init_fn=live_as_long_as_parent,
            timeout=POLL_S,
        )
        return (_unless_error(block) for block in self._patiently(iter(prepared)))

    def _patiently(self, prepared: Iterator[PackedBytes]) -> Iterator[PackedBytes]:
        """What workers prepare; they may take --data-timeout-s, and a signal ends the waiting."""
        limit_s, waited_since = self.plan.options.data_timeout_s, time.monotonic()
        while True:
            try:
                block = next(prepared, None)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
                if self.should_stop():
                    raise ReadingStopped from None
                if time.monotonic() - waited_since > limit_s:
                    raise WorkerError(
                        f"the loader's workers have given nothing for {limit_s:g} s"
                        " (--data-timeout-s): a file system or server that does not answer, or"
                        " samples that take so long; `vico shards verify` reads them all."
                    ) from None
                continue
            if block is None:
                return
            yield block
            waited_since = time.monotonic()

    def _pieces(self) -> Iterator["_Piece"]:
        """What there is to prepare; workers get it from the training process, which alone packs."""
        for step in itertools.islice(self.plan.steps(self.plan_state), self.num_steps):
            first_pack = step.after.consumed_packs - len(step.packs)
            # The same on every rank: it follows from the index alone.
            parts = share(step.costs, num_ranks=self._dp_size, sharing=self._sharing)[self._dp_rank]
            samples_before = list(
                itertools.accumulate((len(pack.sample_ids) for pack in step.packs), initial=0)
            )
            microbatches = [
                _Microbatch(
                    part=part,
                    pack=step.packs[part.pack],
                    first_sample=samples_before[part.pack] + part.first,
                    left_out=frozenset(
                        sample_id
                        for sample_id in step.packs[part.pack].sample_ids
                        if self.skips.leaves_out(sample_id, pack=first_pack + part.pack)
                    ),
                )
                for part in parts
            ]
            size = math.ceil(len(parts) / MAX_PIECES)
            pieces = list(itertools.batched(microbatches, size))
            self._begun.append(_Begun(after=step.after, num_pieces=len(pieces)))
            self._begun_to = step.after
            for piece in pieces:
                yield _Piece(microbatches=piece, num_samples=step.num_samples)

    def _without_known(self, block: PackedBytes) -> PackedBytes:
        packs = [
            dataclasses.replace(pack, skipped=tuple(filter(self.skips.add, pack.skipped)))
            for pack in block.packs
        ]
        return dataclasses.replace(block, packs=packs)


@contextlib.contextmanager
def worker_death_explained(*also: type[Exception]) -> Iterator[None]:
    """Say what a worker's sudden end, or what else it `also` may be, means.

    torch raises it wherever the training process is.
    """
    try:
        yield
    except Exception as error:
        is_torchs = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
        if not (is_torchs or isinstance(error, also)):
            raise
        raise WorkerError(
            f"a worker process of the loader died ({str(error).strip()}): so ends one that a"
            " machine has no memory for (dmesg shows it); fewer --num-workers, --prefetch-steps or"
            " --max-tiles-per-pack take less."
        ) from error


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A step that is being prepared."""

    after: PlanState
    num_pieces: int


@dataclass(frozen=True, kw_only=True)
class _Microbatch:
    """A pack of a step, or the part of it that is this rank's."""

    part: Part
    pack: Pack
    first_sample: int
    """As in `PackedBatch`."""

    left_out: frozenset[int]
    """Samples of it that are known to be broken."""


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Some of a rank's microbatches of a step, which one worker prepares together."""

    microbatches: tuple[_Microbatch, ...]
    num_samples: int
    """Of the step, over all ranks."""


class _PieceDataset(Dataset[PackedBytes | UserError]):
    """Piece -> its packs, or what is wrong with them (torch would wrap an error in a worker)."""

    def __init__(self, data: FolderList, *, encoder: SampleEncoder, builder: PackBuilder) -> None:
        self._data, self._encoder, self._builder = data, encoder, builder

    def __getitem__(self, piece: _Piece) -> PackedBytes | UserError:
        packs, tiles = [], []
        try:
            for each in piece.microbatches:
                samples, skipped = self._samples(each)
                pack = self._builder.build(
                    samples,
                    pack=each.pack,
                    samples_in_global_batch=piece.num_samples,
                    own=slice(each.part.first, each.part.stop),
                )
                packs.append(
                    dataclasses.replace(
                        pack,
                        position=each.part.pack,
                        first_sample=each.first_sample,
                        skipped=tuple(skipped),
                    )
                )
                tiles += [sample.tiles for sample in samples]
        except (SampleError, ConfigError) as error:
            return error
        return packed_bytes.wrap(packs, tiles)

    def _samples(self, microbatch: _Microbatch) -> tuple[list[EncodedSample], list[Skipped]]:
        """The samples of a pack, and why there are gaps; gaps also for those of another part."""
        pack, part = microbatch.pack, microbatch.part
        samples: list[EncodedSample] = []
        skipped = []
        for place, (sample_id, visit) in enumerate(zip(pack.sample_ids, pack.visits, strict=True)):
            known = sample_id in microbatch.left_out or not part.first <= place < part.stop
            found = self._gap(sample_id) if known else self._read(sample_id, visit)
            if isinstance(found, Skipped):
                skipped.append(found)
                found = self._gap(sample_id)
            samples.append(found)
        return samples, skipped

    def _read(self, sample_id: int, visit: int) -> EncodedSample | Skipped:
        """A sample that fits the index, or why it is left out."""
        folder, number = self._data.locate(sample_id)
        random = None
        if self._builder.views == "training":
            random = compression_plan.generator(self._builder.seed, visit, sample_id, "augment")
        try:
            encoded = self._encoder.encode(folder.read(number), random=random)
        except (SampleError, OSError) as error:
            cause = error.cause if isinstance(error, SampleError) else "unreadable shard"
            key = folder.describe(number).key
            return Skipped(sample_id=sample_id, key=key, cause=cause, reason=str(error))
        if (
            encoded.token_ids.size != folder.num_tokens[number]
            or encoded.num_tiles != folder.num_tiles[number]
        ):
            # Not in the budget: packs were made for another sample, and so may all others be.
            raise SampleError(
                f"sample {encoded.key!r}: {encoded.token_ids.size} tokens and {encoded.num_tiles}"
                f" tiles, but the index of {folder.path} says {folder.num_tokens[number]} and"
                f" {folder.num_tiles[number]}; rebuild the index with `vico shards index`."
            )
        return encoded

    def _gap(self, sample_id: int) -> Gap:
        folder, number = self._data.locate(sample_id)
        known = folder.describe(number)
        size = self._encoder.settings.image_size
        return Gap(
            key=known.key,
            token_ids=np.array([GAP_TOKEN_ID], dtype=np.int64),
            is_response=np.zeros(1, dtype=np.bool_),
            tiles=np.empty((0, 3, size, size), dtype=np.uint8),
            missing_tiles=known.tiles_per_image,
        )


def _still_here(skips: SkipList, data: FolderList) -> SkipList:
    """Those still where they were: with --override-data-state a number may be another sample."""

    def is_here(skipped: Skipped) -> bool:
        if skipped.sample_id >= len(data):
            return False
        folder, number = data.locate(skipped.sample_id)
        return folder.describe(number).key == skipped.key

    return SkipList(filter(is_here, skips))


def _unless_error[T](prepared: T | UserError) -> T:
    if isinstance(prepared, UserError):
        raise prepared
    return prepared
