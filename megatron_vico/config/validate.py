"""Checks of a run before any process group, memory or GPU is taken: functions of a RunConfig.

As in layout.py, the checks are iterators over problems, of which the first one is told.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vico.config import layout
from megatron_vico.config.config_json import model_named
from megatron_vico.config.flags import options
from megatron_vico.config.layout import Problems, data_parallel_size, num_microbatches
from megatron_vico.config.pipeline_split import layers_of_a_stage, virtual_stages
from megatron_vico.config.ranges import range_problems
from megatron_vico.config.registry import ModelConfig
from megatron_vico.config.schema import DataOptions, RunConfig, flag_of
from megatron_vico.config.stages import MODULES, STAGES
from megatron_vico.errors import ConfigError, nearest

TEXT_TOKENS = 512  # of a short conversation and its template, in advice
RECOMPUTE_MODULES = ("core_attn", "moe_act", "layernorm", "mlp", "moe")


def validate(cfg: RunConfig, world_size: int, *, model: ModelConfig | None = None) -> None:
    """Raises if a run cannot work, or if one of its settings would have no effect.

    Args:
        cfg: the resolved run.
        world_size: ranks it is meant for.
        model: that of the checkpoint it starts from; unset, what --model-size names.

    Raises:
        ConfigError: saying what was found, what was expected and the fix.
    """
    if model is None:
        model = model_named(cfg.model.model_size or "toy")
    for problem in _problems(_Run(cfg=cfg, model=model, world_size=world_size)):
        raise ConfigError(problem)


@dataclass(frozen=True, kw_only=True)
class _Run:
    cfg: RunConfig
    model: ModelConfig
    world_size: int

    @property
    def has_experts(self) -> bool:
        return self.model.language.num_experts is not None

    @property
    def trains_language_model(self) -> bool:
        return "language_model" in self.cfg.stage.trained


def _problems(run: _Run) -> Problems:
    if run.world_size < 1:
        yield f"the world size is {run.world_size}, expected 1 or more."
    yield from range_problems(run.cfg)
    yield from _stage(run)
    yield from _frozen(run)
    yield from _lr_mult(run)
    yield from _data(run)
    yield from _reading(run.cfg.data)
    yield from layout.layout_problems(run.cfg, run.model, run.world_size)
    yield from _recompute(run)
    yield from _optimizer(run.cfg)
    yield from _fp8(run.cfg)
    yield from _passed_on(run)
    yield from _checkpoints(run.cfg)
    yield from _profile(run)


def remarks(cfg: RunConfig, world_size: int) -> list[str]:
    """What is allowed but probably not meant, a sentence each, of a run that `validate` accepts."""
    return list(_remarks(cfg, world_size))


def _remarks(cfg: RunConfig, world_size: int) -> Iterator[str]:
    parallel, data_parallel = cfg.parallel, data_parallel_size(cfg.parallel, world_size)
    context, pipeline = parallel.context_parallel_size, parallel.pipeline_model_parallel_size
    if data_parallel * context == 1:
        # The encoder is data-parallel over all ranks, so its optimizer state is sharded even then.
        encoder_is_sharded = world_size > 1 and set(cfg.stage.trained) != {"language_model"}
        settings = {
            "--use-distributed-optimizer": (
                cfg.optimizer.use_distributed_optimizer and not encoder_is_sharded
            ),
            "--overlap-grad-reduce": parallel.overlap_grad_reduce,
            "--overlap-param-gather": parallel.overlap_param_gather,
        }
        idle = [flag for flag, on in settings.items() if on]
        if idle:
            yield f"{', '.join(idle)}: no effect with one data-parallel rank."
    if context > 1:
        yield (
            f"each document is padded to a multiple of {2 * context} tokens (2 x"
            " --context-parallel-size), so that a pack can be longer than --seq-length by up to"
            f" {2 * context - 1} tokens a document."
        )
    if cfg.stage.freeze_moe_router and parallel.moe_aux_loss_coeff:
        yield (
            "--freeze-moe-router: the load-balancing loss can only act on the layers before each"
            " router."
        )
    microbatches = num_microbatches(cfg, world_size)
    if pipeline > 1 and microbatches < 2 * pipeline:
        yield (
            f"{microbatches} microbatches on {pipeline} pipeline stages leave much of the pipeline"
            f" empty; {2 * pipeline} or more are better."
        )
    if cfg.checkpoint.save is None:
        yield "--save is not set: no checkpoint, metrics or TensorBoard file will be written."


def _stage(run: _Run) -> Problems:
    cfg, stage_options, spec = run.cfg, run.cfg.stage, run.cfg.stage.spec
    stage, modules = stage_options.stage, stage_options.train_modules
    if modules is not None and (not modules or len(set(modules)) < len(modules)):
        yield f"--train-modules is {modules}, expected one or more modules, each once."
    for module in modules or ():
        if module not in spec.trainable:
            yield (
                f"--train-modules {module}: stage {stage!r} can train"
                f" {', '.join(spec.trainable)} only."
            )
    for name in {name: None for each in STAGES.values() for name in each.options}:
        if name not in spec.options and _is_set(cfg, name):
            where = ", ".join(other for other, each in STAGES.items() if name in each.options)
            yield (
                f"{flag_of(name)} has no effect in stage {stage!r} (only in {where}); leave it out."
            )
    for name in ("drop_path_rate", "encoder_recompute"):
        if _is_set(cfg, name) and "vit" not in stage_options.trained:
            trainable = "vit" in spec.trainable
            yield (
                f"{flag_of(name)} has no effect: the vision tower is frozen; leave it out, or"
                f" {'train it: --train-modules vit ...' if trainable else 'use another stage'}."
            )


def _frozen(run: _Run) -> Problems:
    """Settings of the language model's training, where it is not trained."""
    cfg, stage = run.cfg, run.cfg.stage
    settings = {
        "--moe-aux-loss-coeff": bool(cfg.parallel.moe_aux_loss_coeff),
        "--moe-z-loss-coeff": bool(cfg.transformer.moe_z_loss_coeff),
        "--hidden-dropout": bool(cfg.transformer.hidden_dropout),
        "--attention-dropout": bool(cfg.transformer.attention_dropout),
        "--freeze-moe-router": stage.freeze_moe_router,
        # The encoder's gradients arrive after the schedule: nothing is left to overlap with.
        "--overlap-grad-reduce": cfg.parallel.overlap_grad_reduce,
        "--overlap-param-gather": cfg.parallel.overlap_param_gather,
    }
    for flag, given in settings.items():
        if given and not run.trains_language_model:
            yield f"{flag} has no effect: the language model is frozen; leave it out."
    if stage.freeze_moe_router and not run.has_experts:
        yield f"--freeze-moe-router has no effect: {run.model.name} has no experts; leave it out."
    own = stage.reference_load not in (None, cfg.checkpoint.pretrained_checkpoint)
    moved = {"host": "language_model", "vit": "vit"}.get(stage.reference_offload)
    if moved and stage.spec.reference == "start" and moved not in stage.trained and not own:
        yield (
            f"--reference-offload {stage.reference_offload} has no effect: the"
            f" {moved.replace('_', ' ')} is frozen, hence shared with the policy; leave it out."
        )


def _lr_mult(run: _Run) -> Problems:
    trained = run.cfg.stage.trained
    seen = set()
    for item in run.cfg.stage.lr_mult:
        module, equals, factor = item.partition("=")
        if not equals:
            yield f"--lr-mult {item!r}: expected MODULE=FACTOR, such as connector_16x=3."
        if module not in MODULES:
            yield (
                f"--lr-mult {item!r}: unknown module{nearest(module, MODULES)} (known:"
                f" {', '.join(MODULES)})."
            )
        if module not in trained:
            yield (
                f"--lr-mult {item!r} has no effect: {module} is frozen (trained:"
                f" {', '.join(trained)}); leave it out, or name it in --train-modules."
            )
        try:
            value = float(factor)
        except ValueError:
            value = math.nan
        if not (value > 0 and math.isfinite(value)):
            yield f"--lr-mult {item!r}: the factor is {factor!r}, expected a number above 0."
        if module in seen:
            yield f"--lr-mult names {module} twice; name it once."
        seen.add(module)


def _data(run: _Run) -> Problems:
    data, per_tile = run.cfg.data, run.model.visual_tokens_per_tile
    thumbnail = int(data.use_thumbnail and data.max_dynamic_patch > 1)
    tiles = data.max_dynamic_patch + thumbnail
    if tiles > data.max_tiles_per_pack:
        yield (
            f"--max-tiles-per-pack {data.max_tiles_per_pack} is less than the {tiles} tiles of one"
            f" large image (--max-dynamic-patch {data.max_dynamic_patch} and {thumbnail}"
            f" thumbnail); use {tiles} or more."
        )
    if (visual := tiles * per_tile) > data.seq_length:
        fitting = (data.seq_length - TEXT_TOKENS) // per_tile - thumbnail
        fewer = f", or --max-dynamic-patch {fitting}" if fitting > 0 else ""
        yield (
            f"--seq-length {data.seq_length} is less than the {visual} visual tokens of one large"
            f" image ({tiles} tiles of {per_tile}); use {visual + TEXT_TOKENS} or more{fewer}."
        )
    for name in ("eval_interval", "eval_iters"):
        value = getattr(run.cfg.training, name)
        if value is not None and not data.valid_data_path:
            yield (
                f"{flag_of(name)} {value} has no effect without --valid-data-path; add it, or leave"
                " this out."
            )


def _reading(data: DataOptions) -> Problems:
    if data.num_workers == 0 and data.prefetch_steps != DataOptions().prefetch_steps:
        yield (
            f"--prefetch-steps {data.prefetch_steps} has no effect without workers; leave it out,"
            " or set --num-workers."
        )
    if (data.data_cache_dir is None) != (data.data_cache_gb is None):
        yield (
            f"--data-cache-dir {data.data_cache_dir} and --data-cache-gb {data.data_cache_gb}"
            " belong together; set both."
        )
    paths = (*data.data_path, *data.valid_data_path)
    is_remote = any("://" in path or path.endswith(".json") for path in paths)
    if data.data_cache_dir is not None and data.data_path and not is_remote:
        yield (
            f"--data-cache-dir {data.data_cache_dir} has no effect: no --data-path is a URL; leave"
            " it out, or write file:///... for a folder of a slow file system."
        )


def _recompute(run: _Run) -> Problems:
    parallel, name = run.cfg.parallel, run.model.name
    granularity, num_layers = parallel.recompute_granularity, parallel.recompute_num_layers
    if granularity != "full" and (parallel.recompute_method or num_layers):
        yield (
            "--recompute-method and --recompute-num-layers belong to --recompute-granularity full,"
            f" found {granularity}; leave them out, or use full."
        )
    if granularity == "full" and (parallel.recompute_method is None or num_layers is None):
        yield (
            "--recompute-granularity full needs --recompute-method and --recompute-num-layers;"
            " add --recompute-method uniform --recompute-num-layers 1."
        )
    chunks = virtual_stages(run.cfg, run.model.language) or 1
    layers = layers_of_a_stage(run.cfg, run.model.language) or run.model.language.num_layers
    if granularity == "full" and num_layers is not None and num_layers > layers // chunks:
        part = f"chunk of a pipeline stage ({chunks} chunks a stage)"
        yield (
            f"--recompute-num-layers {num_layers} is more than the {layers // chunks} layers of a"
            f" {part if chunks > 1 else 'pipeline stage'} of {name}; use {layers // chunks} or"
            " fewer."
        )
    if granularity != "selective" and parallel.recompute_modules:
        yield (
            "--recompute-modules belongs to --recompute-granularity selective, found"
            f" {granularity}; leave it out, or use selective."
        )
    for module in parallel.recompute_modules:
        if module not in RECOMPUTE_MODULES:
            yield (
                f"--recompute-modules {module!r} is unknown{nearest(module, RECOMPUTE_MODULES)}"
                f" (known: {', '.join(RECOMPUTE_MODULES)})."
            )
        if module in (("mlp",) if run.has_experts else ("moe", "moe_act")):
            fitting = "moe" if run.has_experts else "mlp"
            yield f"--recompute-modules {module} has no effect on {name}; use {fitting}."
    if "moe_act" in parallel.recompute_modules and not run.cfg.transformer.moe_grouped_gemm:
        yield "--recompute-modules moe_act needs --moe-grouped-gemm; add it, or use moe."


def _optimizer(cfg: RunConfig) -> Problems:
    optimizer, state = cfg.optimizer, cfg.optimizer_state
    if optimizer.min_lr > optimizer.lr:
        yield f"--min-lr {optimizer.min_lr} is more than --lr {optimizer.lr}; use at most --lr."
    decay = optimizer.lr_decay_iters or cfg.training.train_iters
    if optimizer.lr_warmup_iters >= decay and optimizer.lr_warmup_iters:
        yield (
            f"--lr-warmup-iters {optimizer.lr_warmup_iters} leaves nothing of the {decay} steps of"
            " decay; use fewer."
        )
    if cfg.parallel.overlap_param_gather and not (
        optimizer.use_distributed_optimizer and cfg.parallel.overlap_grad_reduce
    ):
        yield (
            "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce;"
            " add both, or leave it out."
        )
    if state.optimizer_cpu_offload and not state.optimizer_offload_fraction:
        # Megatron's own flag defaults to 1.0, megatron-core's field to 0.0: without it nothing
        # would move.
        yield (
            "--optimizer-cpu-offload moves nothing without --optimizer-offload-fraction; add it"
            " (1.0: all)."
        )
    if state.use_precision_aware_optimizer and not optimizer.use_distributed_optimizer:
        yield "--use-precision-aware-optimizer needs --use-distributed-optimizer; add it."
    for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        dtype = getattr(state, name)
        if dtype not in (None, "fp32") and not state.use_precision_aware_optimizer:
            yield f"{flag_of(name)} {dtype} needs --use-precision-aware-optimizer; add it."


def _fp8(cfg: RunConfig) -> Problems:
    fp8 = cfg.parallel.fp8_format
    if fp8 is None:
        for name, value in (vars(cfg.transformer) | vars(cfg.stage)).items():
            if "fp8" in name and value:
                yield (
                    f"{flag_of(name)} has no effect without --fp8-format; add it, or leave this"
                    " out."
                )
        return
    if not cfg.training.bf16:
        yield f"--fp8-format {fp8} needs --bf16 for all that is not FP8; add it."
    if cfg.model.attention == "sdpa":
        yield (
            f"--fp8-format {fp8} needs TransformerEngine's layers, which --attention sdpa leaves"
            " out; use --attention auto."
        )
    if cfg.transformer.fp8_param_gather and not cfg.optimizer.use_distributed_optimizer:
        yield "--fp8-param-gather needs --use-distributed-optimizer; add it."


def _passed_on(run: _Run) -> Problems:
    given = run.cfg.transformer
    for name, value in vars(given).items():
        if name.startswith("moe_") and value is not None and not run.has_experts:
            yield f"{flag_of(name)} has no effect: {run.model.name} has no experts; leave it out."
    if bool(given.fine_grained_activation_offloading) != bool(given.offload_modules):
        yield (
            "--fine-grained-activation-offloading and --offload-modules belong together; give both"
            " (such as --offload-modules core_attn attn_proj) or neither."
        )


def _checkpoints(cfg: RunConfig) -> Problems:
    files = cfg.checkpoint
    if files.ckpt_step is not None and files.load is None:
        yield f"--ckpt-step {files.ckpt_step} chooses a step of --load, which is not set; set it."
    if cfg.data.override_data_state and files.load is None:
        yield "--override-data-state is about a run that goes on, but --load is not set; set it."
    of_files = {name: getattr(files, name) for name in ("keep_last", "keep_every", "wandb_project")}
    for name, value in ({"save_interval": cfg.training.save_interval} | of_files).items():
        if value is not None and files.save is None:
            yield f"{flag_of(name)} {value} needs --save; set it to a folder."
    if cfg.training.on_bad_step == "rollback" and files.save is None:
        yield "--on-bad-step rollback needs checkpoints to go back to; set --save."


def _profile(run: _Run) -> Problems:
    training = run.cfg.training
    if not training.profile:
        for name in ("profile_step_start", "profile_step_end", "profile_ranks"):
            if _is_set(run.cfg, name):
                yield f"{flag_of(name)} has no effect without --profile; add it, or leave both."
        return
    if run.cfg.checkpoint.save is None:
        yield "--profile writes to <save>/trace, but --save is not set; set it."
    start, end = training.profile_step_start, training.profile_step_end
    if end <= start:
        yield f"--profile-step-end is {end}, expected more than --profile-step-start, {start}."
    if end > training.train_iters:
        yield (
            f"--profile-step-end {end} is never reached: --train-iters is {training.train_iters};"
            " use at most that."
        )
    for rank in training.profile_ranks:
        if not 0 <= rank < run.world_size:
            yield f"--profile-ranks {rank}: the run has ranks 0 to {run.world_size - 1}."


def _is_set(cfg: RunConfig, name: str) -> bool:
    """Whether an option has another value than its default."""
    section = options()[name].section
    value, default = (getattr(getattr(each, section), name) for each in (cfg, RunConfig()))
    return bool(value != default)
