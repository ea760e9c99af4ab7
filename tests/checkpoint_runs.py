"""A model with optimizer and scheduler that steps on made-up gradients, for the tests of training
checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_vico.checkpoint import training_checkpoint
from megatron_vico.checkpoint.run_folder import iteration_folder
from megatron_vico.config.registry import ModelConfig, get_model_config
from megatron_vico.config.schema import ParallelOptions, RunConfig, TrainingOptions
from megatron_vico.convert.modules import canonical_state
from megatron_vico.models.build import (
    build_language_chunks,
    build_vision_encoder,
    language_transformer_config,
    vision_transformer_config,
)
from megatron_vico.parallel.groups import Groups

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training checkpoint is made of."""

    size: str
    modules: Mapping[str, Sequence[MegatronModule]]
    """By name, the chunks of this rank."""
    wrapped: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    def step(self, number: int) -> None:
        """One optimizer step; the gradients depend on the rank, and DDP sums them."""
        generator = torch.Generator().manual_seed(1000 * number + torch.distributed.get_rank())
        for module in self.wrapped:
            module.zero_grad_buffer()
        self.optimizer.zero_grad()
        for module in self.wrapped:
            for param in module.parameters():
                if param.requires_grad:
                    param.main_grad.copy_(torch.randn(param.shape, generator=generator))
            module.finish_grad_sync()
        self.optimizer.step()
        self.scheduler.step(increment=1)

    def save(
        self,
        folder: Path,
        iteration: int,
        trainer_state: dict[str, Any] | None = None,
        *,
        earlier: Path | None = None,
    ) -> Path:
        """Write a checkpoint with everything in it."""
        return training_checkpoint.save_checkpoint(
            iteration_folder(folder, iteration),
            modules=self.modules,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            trainer_state=trainer_state,
            config_yaml="a: 1\n",
            metadata=training_checkpoint.CheckpointMetadata(
                model_size=self.size, stage="consistency"
            ),
            earlier=earlier,
        )

    def load(self, folder: Path, iteration: int | None = None) -> dict[str, Any]:
        """Resume."""
        return training_checkpoint.load_checkpoint(
            folder,
            modules=self.modules,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            model_size=self.size,
            iteration=iteration,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all weights, under the table's names, where this rank has all of them."""
        whole = {name: chunks[0] for name, chunks in self.modules.items()}
        return {name: tensor.clone() for name, tensor in canonical_state(whole).items()}


def make_training(
    size: str | ModelConfig,
    *,
    groups: Groups,
    seed: int,
    dtype: str = "fp32",
    optimizer: str = "replicated",
    frozen: str = "",
    parallel: ParallelOptions | None = None,
    clip_grad: float = 1.0,
) -> Training:
    """A toy model before its first step of training; its optimizer may be `sharded` over the
    data-parallel ranks, and `frozen` names a module that gets none."""
    torch.manual_seed(seed)
    model = get_model_config(size) if isinstance(size, str) else size
    bf16, sharded = dtype == "bf16", optimizer == "sharded"
    encoder = build_vision_encoder(
        model, vision_transformer_config(model, bf16=bf16), pg_collection=groups.encoder
    )
    cfg = RunConfig(training=TrainingOptions(bf16=bf16), parallel=parallel or ParallelOptions())
    chunks = build_language_chunks(
        model,
        language_transformer_config(model, cfg),
        pg_collection=groups.language,
        attention="sdpa",
    )
    modules: dict[str, Sequence[MegatronModule]] = {
        "language_model": [chunk.to(FORMATS[dtype]) for chunk in chunks],
        "encoder": [encoder.to(FORMATS[dtype])],
    }
    options = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        min_lr=1e-4,
        weight_decay=0.1,
        clip_grad=clip_grad,
        bf16=bf16,
        params_dtype=FORMATS[dtype],
        use_distributed_optimizer=sharded,
    )
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=sharded)
    wrapped, chained = [], []
    for name, parts in modules.items():
        if name == frozen:
            for chunk in parts:
                chunk.requires_grad_(False)
            continue
        group = groups.encoder if name == "encoder" else groups.language
        wrapped_parts, optimizers = _wrapped(parts, options, ddp, pg_collection=group)
        wrapped += wrapped_parts
        chained += optimizers
    joined = ChainedOptimizer(chained)
    return Training(
        size=model.name,
        modules=modules,
        wrapped=wrapped,
        optimizer=joined,
        scheduler=_scheduler(joined),
    )


def _wrapped(
    parts: Sequence[MegatronModule],
    options: OptimizerConfig,
    ddp: DistributedDataParallelConfig,
    *,
    pg_collection: ProcessGroupCollection,
) -> tuple[list[DistributedDataParallel], list[MegatronOptimizer]]:
    """A module's chunks with the same weights on all ranks, and their optimizers."""
    wrapped = [
        DistributedDataParallel(part.config, ddp, part, pg_collection=pg_collection)
        for part in parts
    ]
    for part in wrapped:
        part.broadcast_params()
    built = get_megatron_optimizer(
        options, wrapped, use_gloo_process_groups=False, pg_collection=pg_collection
    )
    return wrapped, getattr(built, "chained_optimizers", [built])


def _scheduler(optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=1e-2,
        min_lr=1e-4,
        lr_warmup_steps=3,
        lr_decay_steps=20,
        lr_decay_style="cosine",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=20,
        wd_incr_style="constant",
    )
