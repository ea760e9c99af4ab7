"""Steps of a run as data to compare: losses, norms, and every gradient and parameter under
its global name."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_vico.checkpoint import training_checkpoint
from megatron_vico.checkpoint.run_folder import iteration_folder
from megatron_vico.config.registry import get_model_config
from megatron_vico.config.schema import RunConfig
from megatron_vico.data.load.packed_bytes import PackedBytes
from megatron_vico.data.samples import PackedStream
from megatron_vico.parallel.batch import shared_batches
from megatron_vico.parallel.groups import Groups
from megatron_vico.training.metrics import StepFigures
from megatron_vico.training.setup import Run, build_modules, named_modules, set_up
from megatron_vico.training.trainer import compute_gradients, update_weights
from tests.distributed.global_weights import Part, parts_of
from tests.packs import WholePack, as_blocks, whole_packs

STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run: a stage of a model under a layout, compared with the same run of one process."""

    name: str
    cfg: RunConfig
    truth: str
    """Which one-process run it is compared with."""

    empty_pack: int | None = None
    """Pack of each step whose response rows are taken away."""

    broken: str = ""
    """A negative control: whose gradients are not summed, `rows` or `keys`."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """One step on one rank."""

    figures: StepFigures
    num_tiles: tuple[int, ...]
    """Of each pack of this replica."""

    parts: tuple[Part, ...]
    grads: tuple[Tensor | None, ...]
    """None where the weight is frozen."""

    params: tuple[Tensor | None, ...]
    """None where they are still being gathered."""


def record(case: Case, groups: Groups) -> Iterator[Recorded]:
    """Run the steps; called by every rank."""
    run = set_up(case.cfg, groups)
    run.policy.train_mode()
    modules = {"language_model": run.policy.language_chunks, "encoder": [run.policy.encoder]}
    batches = run.batches()
    if run.data.loader is not None and case.empty_pack is not None:
        batches = shared_batches(_emptied(run, case.empty_pack), num_steps=STEPS, groups=groups)
    for number, batch in enumerate(batches):
        sums = compute_gradients(run, batch)
        grads = {param: grad for ddp in run.policy.ddp_modules for param, grad in _main_grads(ddp)}
        norm = update_weights(run)
        parts = tuple(parts_of(modules, groups))
        # Parameters that are gathered in the next forward pass are looked at after the last step
        # only: waiting for them earlier would hide a forward pass that does not.
        whole = not case.cfg.parallel.overlap_param_gather or number == STEPS - 1
        if whole:
            run.policy.finish_param_sync()
        yield Recorded(
            figures=StepFigures.reduce(
                sums, iteration=number, grad_norm=norm, learning_rate=0.0, step_time_s=0.0
            ),
            num_tiles=tuple(pack.num_tiles for pack in batch.packs),
            parts=parts,
            grads=tuple(grads.get(part.param) for part in parts),
            params=tuple(part.param.detach().clone() if whole else None for part in parts),
        )


def save_models(folder: Path, model_size: str, cfg: RunConfig, groups: Groups) -> None:
    """A policy with every weight random, and a reference not far from it, as two checkpoints of one
    process."""
    from tests.toy_models import randomise

    model = get_model_config(model_size)
    encoder, chunks = build_modules(cfg, model, groups)
    generator = torch.Generator().manual_seed(3)
    for index, module in enumerate((encoder, *chunks)):
        randomise(module, seed=index)
    for name in ("reference", "policy"):
        training_checkpoint.save_checkpoint(
            iteration_folder(folder / name, 0),
            modules=named_modules(encoder, chunks),
            metadata=training_checkpoint.CheckpointMetadata(
                model_size=model_size, stage="pretrain"
            ),
        )
        with torch.no_grad():
            for chunk in chunks:
                for param in chunk.parameters():
                    param += 0.02 * torch.randn(param.shape, generator=generator)


def _main_grads(ddp: DistributedDataParallel) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """The reduced gradient of every parameter; of a distributed optimizer's, each rank has a
    shard."""
    for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers):
        whole = buffer.grad_data.clone()
        if ddp.ddp_config.use_distributed_optimizer:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                start = bucket.offset
                shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                shards = [torch.empty_like(shard) for _ in range(group.size())]
                torch.distributed.all_gather(shards, shard, group=group)
                whole[start : start + bucket.grad_data.numel()] = torch.cat(shards)
        for param in buffer.params:
            start, end, _ = buffer.param_index_map[param]
            yield param, whole[start:end].view(param.shape)


def _emptied(run: Run, index: int) -> Iterator[Sequence[PackedBytes]]:
    assert run.data.loader is not None
    for blocks in run.data.loader:
        changed = whole_packs(blocks)
        changed[index] = _without_rows(changed[index])
        yield as_blocks(changed)


def _without_rows(pack: WholePack) -> WholePack:
    def no_rows(stream: PackedStream) -> PackedStream:
        return dataclasses.replace(stream, response_rows=stream.response_rows[:0])

    return dataclasses.replace(
        pack,
        sample_of_row=pack.sample_of_row[:0],
        labels=pack.labels[:0],
        kl_weight=pack.kl_weight[:0],
        reference=no_rows(pack.reference),
        policies=tuple(map(no_rows, pack.policies)),
    )
