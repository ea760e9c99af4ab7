"""Builds everything a run needs, in the order that each part needs the one before it."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_vico.checkpoint import training_checkpoint
from megatron_vico.checkpoint.run_folder import (
    has_checkpoint,
    iteration_folder,
    read_metadata,
    resolve_model,
)
from megatron_vico.checkpoint.training_checkpoint import Modules
from megatron_vico.config.registry import ModelConfig
from megatron_vico.config.schema import RunConfig
from megatron_vico.config.stages import MODULES, Module
from megatron_vico.data.load.loader import Loader
from megatron_vico.errors import CheckpointError, ConfigError
from megatron_vico.models.build import (
    build_language_chunks,
    build_vision_encoder,
    language_transformer_config,
    vision_transformer_config,
)
from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.models.language_model import LanguageModel
from megatron_vico.parallel.batch import StepBatch, shared_batches
from megatron_vico.parallel.groups import Groups
from megatron_vico.training.bad_steps import GuardedOptimizer, StepWatch
from megatron_vico.training.data_state import DataState, build_loader
from megatron_vico.training.offload import HostOffload
from megatron_vico.training.optimizer import build_optimizer, build_scheduler
from megatron_vico.training.policy import Policy, wrap
from megatron_vico.training.reference import Reference, share_equal_modules
from megatron_vico.training.step_clock import StepClock
from megatron_vico.vico.router_targets import RatioWindow


@dataclass(frozen=True, kw_only=True)
class Run:
    """All parts of a run; the loop in trainer.py only puts them to work."""

    cfg: RunConfig
    groups: Groups
    model: ModelConfig
    policy: Policy
    reference: Reference | None
    watch: StepWatch
    window: RatioWindow
    optimizer: GuardedOptimizer
    scheduler: OptimizerParamScheduler
    clock: StepClock
    data: DataState
    """Reads the replica's packs, on its first rank, and counts broken samples."""

    iteration: int
    """Optimizer steps already done when the run starts."""

    trained_so_far: tuple[Module, ...] | None
    """For its checkpoints' metadata: what it trains, and what was trained before it."""

    @property
    def resumed_from(self) -> Path | None:
        """The checkpoint that the run was resumed from; None for a new one."""
        load = self.cfg.checkpoint.load
        return (
            None if load is None or not self.iteration else iteration_folder(load, self.iteration)
        )

    @property
    def modules(self) -> Modules:
        """What a checkpoint holds, by name."""
        return named_modules(self.policy.encoder, self.policy.language_chunks)

    def batches(self, iteration: int | None = None) -> Iterator[StepBatch]:
        """The steps left after `iteration` (None: the start), on all ranks; every rank iterates."""
        done = self.iteration if iteration is None else iteration
        num_steps = self.cfg.training.train_iters - done
        if self.data.loader is not None:
            self.data.loader.num_steps = num_steps
        return self.spread(self.data.loader, num_steps=num_steps)

    def spread(self, loader: Loader | None, *, num_steps: int) -> Iterator[StepBatch]:
        """What a loader reads on a replica's first rank, on all its ranks; every rank iterates."""
        return shared_batches(
            loader, num_steps=num_steps, groups=self.groups, whole_images=self.whole_images
        )

    @property
    def whole_images(self) -> bool:
        """Whether the tiles of an image stay on one rank: the router looks at all of them."""
        options = self.cfg.stage
        return options.spec.plans == "one_tile" and options.router_granularity == "image"


def named_modules(encoder: VisionEncoder, language_chunks: Sequence[LanguageModel]) -> Modules:
    """The modules of a model under the names that checkpoints have for them."""
    return {"language_model": language_chunks, "encoder": encoder}


def set_up(cfg: RunConfig, groups: Groups, *, between: Callable[[], None] = lambda: None) -> Run:
    """Models, weights, optimizer and data of a run, resumed where --load has a checkpoint.

    `between` is called by every rank where something slow is done.

    Raises:
        ConfigError: if the stage has nothing to start from.
        CheckpointError: if a checkpoint is broken or of another model.
    """
    model = resolve_model(cfg)
    load = cfg.checkpoint.load
    resume = load if load and has_checkpoint(load) else None
    step = cfg.checkpoint.ckpt_step if resume else None
    start_from = resume or cfg.checkpoint.pretrained_checkpoint
    if start_from is None and cfg.stage.spec.needs_reference:
        raise ConfigError(
            f"stage {cfg.stage.stage!r} has nothing to start from: give --pretrained-checkpoint, "
            f"or --load with a checkpoint in it (found --load {load})"
        )

    def start(modules: Modules) -> None:
        if resume is None and start_from is not None:
            training_checkpoint.load_weights(start_from, modules=modules, model_size=model.name)

    policy, optimizer, scheduler = build_policy(cfg, model, groups, load=start)
    between()
    modules = named_modules(policy.encoder, policy.language_chunks)
    window = RatioWindow(size=cfg.stage.router_window, percentile=cfg.stage.router_percentile)
    iteration, data_state, recent = 0, None, []
    if resume is not None:
        restored = training_checkpoint.load_checkpoint(
            resume,
            modules=modules,
            optimizer=optimizer,
            scheduler=scheduler,
            model_size=model.name,
            iteration=step,
        )
        iteration, data_state = restored["iteration"], _state_of_data(restored, resume)
        window.load(restored["router_window"])
        recent = restored.get("recent_steps", [])
        between()
    loader = None
    if groups.replica.rank() == 0:
        loader = build_loader(
            cfg, model, groups, num_steps=cfg.training.train_iters - iteration, state=data_state
        )
    reference = None
    if cfg.stage.spec.needs_reference:
        reference = load_reference(cfg, model, policy, groups)
        between()
    return Run(
        cfg=cfg,
        groups=groups,
        model=model,
        policy=policy,
        reference=reference,
        watch=StepWatch(cfg.training, recent),
        window=window,
        clock=StepClock(groups.device),
        optimizer=optimizer,
        scheduler=scheduler,
        data=DataState.of(
            loader, max_skipped_share=cfg.data.max_skipped_share, restored=data_state
        ),
        iteration=iteration,
        trained_so_far=_trained_so_far(cfg, start_from, step),
    )


def _trained_so_far(
    cfg: RunConfig, start_from: str | None, step: int | None
) -> tuple[Module, ...] | None:
    before: tuple[Module, ...] | None = ()
    if start_from is not None:
        before = read_metadata(start_from, step).trained
    if before is None:
        return None
    return tuple(name for name in MODULES if name in before or name in cfg.stage.trained)


def build_policy(
    cfg: RunConfig, model: ModelConfig, groups: Groups, *, load: Callable[[Modules], None]
) -> tuple[Policy, GuardedOptimizer, OptimizerParamScheduler]:
    """What is trained, and what trains it; `load` fills in the weights of a fresh run."""
    encoder, language_chunks = build_modules(cfg, model, groups)
    # Before the optimizer, whose masters are copies of them.
    load(named_modules(encoder, language_chunks))
    policy = wrap(encoder, language_chunks, cfg, groups=groups)
    optimizer = build_optimizer(policy, cfg, groups=groups)
    return policy, optimizer, build_scheduler(optimizer, cfg.optimizer, cfg.training)


def build_modules(
    cfg: RunConfig, model: ModelConfig, groups: Groups, *, on_host: bool = False
) -> tuple[VisionEncoder, tuple[LanguageModel, ...]]:
    """An encoder and this rank's chunks of a language model, fresh, each with its own config.

    `on_host`: in the host's memory, where their weights have no values yet.
    """
    bf16, device = cfg.training.bf16, torch.device("cpu") if on_host else groups.device
    language_config = language_transformer_config(model, cfg)
    vision_config = vision_transformer_config(
        model,
        bf16=bf16,
        drop_path_rate=cfg.model.drop_path_rate,
        recompute_granularity="full" if cfg.model.encoder_recompute == "layer" else None,
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    for config in (language_config, vision_config) if on_host else ():
        config.use_cpu_initialization, config.perform_initialization = True, False
    language_chunks = build_language_chunks(
        model,
        language_config,
        pg_collection=groups.language,
        attention=cfg.model.attention,
        head_chunk_rows=cfg.stage.kl_chunk_rows,
    )
    with device:  # torch's own modules would begin in fp32 in the host's memory
        encoder = build_vision_encoder(model, vision_config, pg_collection=groups.encoder)
    dtype = torch.bfloat16 if bf16 else torch.float32
    return encoder.to(device, dtype), tuple(chunk.to(device, dtype) for chunk in language_chunks)


def load_reference(cfg: RunConfig, model: ModelConfig, policy: Policy, groups: Groups) -> Reference:
    """The reference of a policy that has its weights; ConfigError if none is named."""
    source = cfg.stage.reference_load or cfg.checkpoint.pretrained_checkpoint
    if source is None:
        raise ConfigError(
            f"stage {cfg.stage.stage!r} resumes from {cfg.checkpoint.load} but does not know its"
            " frozen reference: give --reference-load, or the --pretrained-checkpoint that the"
            " stage began with"
        )
    load = functools.partial(training_checkpoint.load_weights, source, model_size=model.name)
    reference = build_reference(
        cfg, model, policy, groups, load=lambda modules: load(modules=modules)
    )
    if cfg.stage.spec.reference == "named":
        differ = torch.tensor(float(not reference.equals_policy), device=groups.device)
        torch.distributed.all_reduce(differ)
        if not differ:
            raise ConfigError(
                f"--reference-load {source}: its weights are the policy's own, so that no tile can"
                " be told from another (Eq. 2 divides by the difference); give the checkpoint from"
                " before consistency training."
            )
    return reference


def build_reference(
    cfg: RunConfig,
    model: ModelConfig,
    policy: Policy,
    groups: Groups,
    *,
    load: Callable[[Modules], None],
) -> Reference:
    """The reference of a policy that has its weights; `load` fills in its own."""
    # What the policy has already would be on the device twice until it is shared: of 241B that is
    # more than an H200 has. A dry run has no host's memory to build it in.
    on_host = _shares_language_model(cfg) and groups.device.type != "meta"
    with torch.no_grad():  # else TransformerEngine keeps a transposed copy of each FP8 weight
        encoder, language_chunks = build_modules(
            reference_config(cfg), model, groups, on_host=on_host
        )
    load(named_modules(encoder, language_chunks))
    return freeze_reference(encoder, language_chunks, policy, cfg=cfg, groups=groups)


def _shares_language_model(cfg: RunConfig) -> bool:
    """Whether the reference's is the policy's, which was not trained since."""
    return cfg.stage.spec.reference == "start" and "language_model" not in cfg.stage.trained


def reference_config(cfg: RunConfig) -> RunConfig:
    """A run's configuration as its reference is built from: nothing in it has a backward pass.

    With FP8 its weights are kept in no other format, but where they can be shared with the policy.
    """
    transformer = cfg.transformer
    if cfg.parallel.fp8_format is not None and not _shares_language_model(cfg):
        transformer = dataclasses.replace(transformer, fp8_param_gather=True)
    return dataclasses.replace(
        cfg,
        parallel=dataclasses.replace(
            cfg.parallel,
            recompute_granularity=None,
            recompute_method=None,
            recompute_num_layers=None,
            recompute_modules=(),
            moe_aux_loss_coeff=0.0,
        ),
        transformer=transformer,
        model=dataclasses.replace(cfg.model, drop_path_rate=0.0, encoder_recompute="chunk"),
    )


def freeze_reference(
    encoder: VisionEncoder,
    language_chunks: tuple[LanguageModel, ...],
    policy: Policy,
    *,
    cfg: RunConfig,
    groups: Groups,
) -> Reference:
    """The reference from modules that have their weights.

    They are built from `reference_config`. What the policy keeps frozen and bitwise equal is shared
    with it; of the other weights those are in the host's memory that the run names. What it never
    uses is dropped.
    """
    encoder.requires_grad_(False).eval()
    for chunk in language_chunks:
        chunk.requires_grad_(False).eval()
    for name in ("connector_16x", "vir"):  # nothing is compressed, nothing routed
        delattr(encoder, name)
    shared = share_equal_modules(encoder, policy.encoder, ("vit", "connector_4x"))
    shared_chunks = 0
    if "language_model" not in policy.trained:
        for chunk, policy_chunk in zip(language_chunks, policy.language_chunks, strict=True):
            if chunk.config.fp8 == policy_chunk.config.fp8:
                shared_chunks += len(share_equal_modules(chunk, policy_chunk, ("gpt",)))
    encoder.to(groups.device)
    for chunk in language_chunks:
        chunk.to(groups.device)
    return Reference(
        encoder=encoder,
        language_chunks=language_chunks,
        shares_vit="vit" in shared,
        equals_policy=len(shared) == 2 and shared_chunks == len(language_chunks),
        chunk_tiles=cfg.model.encoder_chunk_tiles,
        offload=(
            _offload(language_chunks, policy, groups)
            if cfg.stage.reference_offload == "host"
            else None
        ),
        vit_offload=(
            HostOffload(encoder.vit.parameters(), groups.device)
            if cfg.stage.reference_offload != "none" and "vit" not in shared
            else None
        ),
    )


def _offload(chunks: Sequence[LanguageModel], policy: Policy, groups: Groups) -> HostOffload:
    """The reference's language model without the head, for the policy pass, and what is shared."""
    kept = {id(param) for chunk in policy.language_chunks for param in chunk.parameters()}
    if groups.is_last_stage:
        kept.add(id(chunks[-1].head_weight))
    return HostOffload(
        (param for chunk in chunks for param in chunk.parameters() if id(param) not in kept),
        groups.device,
    )


def _state_of_data(restored: dict[str, Any], source: str) -> dict[str, Any]:
    if "data" not in restored:
        raise CheckpointError(
            f"{source} was saved before checkpoints knew their place in the data, so no run can go"
            " on from it; begin a new one from its weights with --pretrained-checkpoint."
        )
    state_of_data: dict[str, Any] = restored["data"]
    return state_of_data
