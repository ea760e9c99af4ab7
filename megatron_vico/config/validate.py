"""Checks of a whole run before any process group, memory or GPU is taken: pure functions on a
RunConfig."""

import math

from megatron_vico.config.config_json import model_named
from megatron_vico.config.flags import flag_of
from megatron_vico.config.layout import (
    check_layout,
    data_parallel_size,
    layers_of_a_stage,
    num_microbatches,
    virtual_stages,
)
from megatron_vico.config.registry import ModelConfig
from megatron_vico.config.schema import (
    DataOptions,
    ParallelOptions,
    RunConfig,
    StageOptions,
    TrainingOptions,
)
from megatron_vico.config.stages import MODULES, STAGES, Stage
from megatron_vico.errors import ConfigError, nearest

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
    _check_ranges(cfg)
    _check_stage(cfg)
    _check_frozen(cfg, model)
    _check_lr_mult(cfg.stage)
    _check_data(cfg, model)
    _check_reading(cfg.data)
    check_layout(cfg, model=model, world_size=world_size)
    _check_recompute(cfg, model)
    _check_optimizer(cfg)
    _check_precision(cfg)
    _check_passed_on(cfg, model)
    _check_checkpoints(cfg)
    _check_profile(cfg, world_size)


def remarks(cfg: RunConfig, world_size: int) -> list[str]:
    """What is allowed but probably not meant; for a run that `validate` accepts.

    Args:
        cfg: the resolved run.
        world_size: ranks it is meant for.

    Returns:
        One sentence each.
    """
    found = []
    data_parallel, context = (
        data_parallel_size(cfg.parallel, world_size),
        cfg.parallel.context_parallel_size,
    )
    microbatches, pipeline = (
        num_microbatches(cfg, world_size),
        cfg.parallel.pipeline_model_parallel_size,
    )
    if data_parallel * context == 1:
        # The encoder is data-parallel over all ranks, so its optimizer state is sharded even then.
        encoder_is_sharded = world_size > 1 and set(cfg.stage.trained) != {"language_model"}
        settings = {
            "--use-distributed-optimizer": (
                cfg.optimizer.use_distributed_optimizer and not encoder_is_sharded
            ),
            "--overlap-grad-reduce": cfg.parallel.overlap_grad_reduce,
            "--overlap-param-gather": cfg.parallel.overlap_param_gather,
        }
        idle = [flag for flag, on in settings.items() if on]
        if idle:
            found.append(f"{', '.join(idle)}: no effect with one data-parallel rank.")
    if context > 1:
        found.append(
            f"each document is padded to a multiple of {2 * context} tokens (2 x"
            " --context-parallel-size), so that a pack can be longer than --seq-length by up to"
            f" {2 * context - 1} tokens a document."
        )
    if cfg.stage.freeze_moe_router and cfg.parallel.moe_aux_loss_coeff:
        found.append(
            "--freeze-moe-router: the load-balancing loss can only act on the layers before each"
            " router."
        )
    if pipeline > 1 and microbatches < 2 * pipeline:
        found.append(
            f"{microbatches} microbatches on {pipeline} pipeline stages leave much of the pipeline"
            f" empty; {2 * pipeline} or more are better."
        )
    if cfg.parallel.fp8_format is not None:
        found.append(fp8_is_not_trained(cfg.parallel))
    if cfg.checkpoint.save is None:
        found.append(
            "--save is not set: no checkpoint, metrics or TensorBoard file will be written."
        )
    return found


def fp8_is_not_trained(parallel: ParallelOptions) -> str:
    """Why a run with --fp8-format is checked, but not started."""
    return (
        f"--fp8-format {parallel.fp8_format}: checked by `vico train --check`, but not trained with"
        " until the KL between an FP8 and a bf16 reference has been measured on a GPU; leave it"
        " out."
    )


def _check_ranges(cfg: RunConfig) -> None:
    at_least = {
        "--seq-length": (cfg.data.seq_length, 1),
        "--max-tiles-per-pack": (cfg.data.max_tiles_per_pack, 1),
        "--max-samples-per-pack": (cfg.data.max_samples_per_pack, 1),
        "--packing-window": (cfg.data.packing_window, 1),
        "--shuffle-shards": (cfg.data.shuffle_shards, 1),
        "--max-dynamic-patch": (cfg.data.max_dynamic_patch, 1),
        "--num-workers": (cfg.data.num_workers, 0),
        "--data-retries": (cfg.data.data_retries, 0),
        "--data-cache-gb": (cfg.data.data_cache_gb, 0.0),
        "--prefetch-steps": (cfg.data.prefetch_steps, 1),
        "--train-iters": (cfg.training.train_iters, 1),
        "--global-batch-size": (cfg.training.global_batch_size, 1),
        "--seed": (cfg.training.seed, 0),
        "--log-interval": (cfg.training.log_interval, 1),
        "--save-interval": (cfg.training.save_interval, 1),
        "--exit-interval": (cfg.training.exit_interval, 1),
        "--eval-interval": (cfg.training.eval_interval, 1),
        "--eval-iters": (cfg.training.eval_iters, 1),
        "--profile-step-start": (cfg.training.profile_step_start, 0),
        "--distributed-timeout-minutes": (cfg.training.distributed_timeout_minutes, 1),
        "--ckpt-step": (cfg.checkpoint.ckpt_step, 0),
        "--lr-warmup-iters": (cfg.optimizer.lr_warmup_iters, 0),
        "--lr-decay-iters": (cfg.optimizer.lr_decay_iters, 1),
        "--min-lr": (cfg.optimizer.min_lr, 0.0),
        "--weight-decay": (cfg.optimizer.weight_decay, 0.0),
        "--clip-grad": (cfg.optimizer.clip_grad, 0.0),
        "--moe-aux-loss-coeff": (cfg.parallel.moe_aux_loss_coeff, 0.0),
        "--router-window": (cfg.stage.router_window, 1),
        "--recompute-num-layers": (cfg.parallel.recompute_num_layers, 1),
        "--encoder-chunk-tiles": (cfg.model.encoder_chunk_tiles, 1),
        "--kl-chunk-rows": (cfg.stage.kl_chunk_rows, 1),
    }
    for flag, (value, least) in at_least.items():
        # Written so that NaN fails too.
        if value is not None and not (value >= least and math.isfinite(value)):
            raise ConfigError(f"{flag} is {value}, expected {least} or more.")
    for flag, value in (("--lr", cfg.optimizer.lr), ("--adam-eps", cfg.optimizer.adam_eps)):
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{flag} is {value}, expected more than 0.")
    below_one = {
        "--drop-path-rate": cfg.model.drop_path_rate,
        "--adam-beta1": cfg.optimizer.adam_beta1,
        "--adam-beta2": cfg.optimizer.adam_beta2,
    }
    for flag, value in below_one.items():
        if not 0.0 <= value < 1.0:
            raise ConfigError(f"{flag} is {value}, expected a number in [0, 1).")
    if not 0.0 <= cfg.data.max_skipped_share <= 1.0:
        raise ConfigError(
            f"--max-skipped-share is {cfg.data.max_skipped_share}, expected a number in [0, 1]."
        )
    if not 0.0 <= cfg.stage.router_percentile <= 100.0:
        raise ConfigError(
            f"--router-percentile is {cfg.stage.router_percentile}, expected a number in [0, 100]."
        )
    if not cfg.stage.router_eps >= 0.0:
        raise ConfigError(f"--router-eps is {cfg.stage.router_eps}, expected 0 or more.")


def _check_stage(cfg: RunConfig) -> None:
    options, stage, spec = cfg.stage, cfg.stage.stage, cfg.stage.spec
    if options.train_modules is not None:
        if not options.train_modules or len(set(options.train_modules)) < len(
            options.train_modules
        ):
            raise ConfigError(
                f"--train-modules is {options.train_modules}, expected one or more modules, each"
                " once."
            )
        for module in options.train_modules:
            if module not in spec.trainable:
                raise ConfigError(
                    f"--train-modules {module}: stage {stage!r} can train"
                    f" {', '.join(spec.trainable)} only."
                )
    _check_options_of_stage(options, StageOptions(), stage=stage)
    _check_options_of_stage(cfg.parallel, ParallelOptions(), stage=stage)
    if cfg.model.drop_path_rate and "vit" not in options.trained:
        raise ConfigError(
            f"--drop-path-rate {cfg.model.drop_path_rate} has no effect: the vision tower is"
            " frozen; leave it out, or "
            + (
                "train it: --train-modules vit ..."
                if "vit" in spec.trainable
                else "use another stage"
            )
            + "."
        )


def _check_options_of_stage(given: object, defaults: object, *, stage: Stage) -> None:
    """Options of a section that are set, and act in other stages only."""
    for name in {name: None for spec in STAGES.values() for name in spec.options}:
        if name in STAGES[stage].options or not hasattr(given, name):
            continue
        if getattr(given, name) != getattr(defaults, name):
            where = ", ".join(other for other, spec in STAGES.items() if name in spec.options)
            raise ConfigError(
                f"--{name.replace('_', '-')} has no effect in stage {stage!r} (only in {where});"
                " leave it out."
            )


def _check_frozen(cfg: RunConfig, model: ModelConfig) -> None:
    """Settings of the language model's training, where it is not trained."""
    options, trained = cfg.stage, "language_model" in cfg.stage.trained
    settings = {
        "--moe-aux-loss-coeff": bool(cfg.parallel.moe_aux_loss_coeff),
        "--freeze-moe-router": options.freeze_moe_router,
        # The encoder's gradients arrive after the schedule, when there is nothing left to overlap
        # with.
        "--overlap-grad-reduce": cfg.parallel.overlap_grad_reduce,
        "--overlap-param-gather": cfg.parallel.overlap_param_gather,
    }
    for flag, given in settings.items():
        if given and not trained:
            raise ConfigError(f"{flag} has no effect: the language model is frozen; leave it out.")
    if options.freeze_moe_router and model.language.num_experts is None:
        raise ConfigError(
            f"--freeze-moe-router has no effect: {model.name} has no experts; leave it out."
        )
    own = options.reference_load not in (None, cfg.checkpoint.pretrained_checkpoint)
    if (
        options.reference_offload != "none"
        and options.spec.reference == "start"
        and not trained
        and not own
    ):
        raise ConfigError(
            f"--reference-offload {options.reference_offload} has no effect: the language model is"
            " frozen, so that policy and reference share its weights; leave it out."
        )


def _check_lr_mult(options: StageOptions) -> None:
    trained = options.trained
    seen = set()
    for item in options.lr_mult:
        module, equals, factor = item.partition("=")
        if not equals:
            raise ConfigError(
                f"--lr-mult {item!r}: expected MODULE=FACTOR, such as connector_16x=3."
            )
        if module not in MODULES:
            raise ConfigError(
                f"--lr-mult {item!r}: unknown module{nearest(module, MODULES)} (known:"
                f" {', '.join(MODULES)})."
            )
        if module not in trained:
            raise ConfigError(
                f"--lr-mult {item!r} has no effect: {module} is frozen (trained:"
                f" {', '.join(trained)}); leave it out, or name it in --train-modules."
            )
        try:
            value = float(factor)
        except ValueError:
            value = math.nan
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(
                f"--lr-mult {item!r}: the factor is {factor!r}, expected a number above 0."
            )
        if module in seen:
            raise ConfigError(f"--lr-mult names {module} twice; name it once.")
        seen.add(module)


def _check_data(cfg: RunConfig, model: ModelConfig) -> None:
    data = cfg.data
    thumbnail = int(data.use_thumbnail and data.max_dynamic_patch > 1)
    tiles = data.max_dynamic_patch + thumbnail
    if tiles > data.max_tiles_per_pack:
        raise ConfigError(
            f"--max-tiles-per-pack {data.max_tiles_per_pack} is less than the {tiles} tiles of one"
            f" large image (--max-dynamic-patch {data.max_dynamic_patch} and {thumbnail}"
            f" thumbnail); use {tiles} or more."
        )
    tokens = tiles * model.visual_tokens_per_tile
    if tokens > data.seq_length:
        raise ConfigError(
            f"--seq-length {data.seq_length} is less than the {tokens} visual tokens of one large"
            f" image ({tiles} tiles of {model.visual_tokens_per_tile}); use more, or"
            f" --max-dynamic-patch {max(1, data.seq_length // model.visual_tokens_per_tile - 1)}."
        )
    for flag, value in (
        ("--eval-interval", cfg.training.eval_interval),
        ("--eval-iters", cfg.training.eval_iters),
    ):
        if value is not None and not data.valid_data_path:
            raise ConfigError(
                f"{flag} {value} has no effect without --valid-data-path; add it, or leave this"
                " out."
            )


def _check_recompute(cfg: RunConfig, model: ModelConfig) -> None:
    parallel, moe = cfg.parallel, model.language.num_experts is not None
    granularity = parallel.recompute_granularity
    if granularity != "full" and (parallel.recompute_method or parallel.recompute_num_layers):
        raise ConfigError(
            "--recompute-method and --recompute-num-layers belong to --recompute-granularity full,"
            f" found {granularity}; leave them out, or use full."
        )
    if granularity == "full":
        if parallel.recompute_method is None or parallel.recompute_num_layers is None:
            raise ConfigError(
                "--recompute-granularity full needs --recompute-method and --recompute-num-layers; "
                "add --recompute-method uniform --recompute-num-layers 1."
            )
        chunks = virtual_stages(cfg, model.language) or 1
        layers = (layers_of_a_stage(cfg, model.language) or model.language.num_layers) // chunks
        if parallel.recompute_num_layers > layers:
            part = (
                "pipeline stage"
                if chunks == 1
                else f"chunk of a pipeline stage ({chunks} chunks a stage)"
            )
            raise ConfigError(
                f"--recompute-num-layers {parallel.recompute_num_layers} is more than the {layers}"
                f" layers of a {part} of {model.name}; use {layers} or fewer."
            )
    if granularity != "selective" and parallel.recompute_modules:
        raise ConfigError(
            "--recompute-modules belongs to --recompute-granularity selective, found"
            f" {granularity}; leave it out, or use selective."
        )
    for module in parallel.recompute_modules:
        if module not in RECOMPUTE_MODULES:
            raise ConfigError(
                f"--recompute-modules {module!r} is unknown{nearest(module, RECOMPUTE_MODULES)} "
                f"(known: {', '.join(RECOMPUTE_MODULES)})."
            )
        if (module in ("moe", "moe_act") and not moe) or (module == "mlp" and moe):
            fitting = "mlp" if not moe else "moe"
            raise ConfigError(
                f"--recompute-modules {module} has no effect on {model.name}; use {fitting}."
            )
    if "moe_act" in parallel.recompute_modules and not cfg.transformer.moe_grouped_gemm:
        raise ConfigError(
            "--recompute-modules moe_act needs --moe-grouped-gemm; add it, or use moe."
        )


def _check_optimizer(cfg: RunConfig) -> None:
    optimizer, parallel, state = cfg.optimizer, cfg.parallel, cfg.optimizer_state
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(
            f"--min-lr {optimizer.min_lr} is more than --lr {optimizer.lr}; use at most --lr."
        )
    decay = optimizer.lr_decay_iters or cfg.training.train_iters
    if optimizer.lr_warmup_iters >= decay and optimizer.lr_warmup_iters:
        raise ConfigError(
            f"--lr-warmup-iters {optimizer.lr_warmup_iters} leaves nothing of the {decay} steps of"
            " decay; use fewer."
        )
    if parallel.overlap_param_gather and not (
        optimizer.use_distributed_optimizer and parallel.overlap_grad_reduce
    ):
        raise ConfigError(
            "--overlap-param-gather needs --use-distributed-optimizer and --overlap-grad-reduce; "
            "add both, or leave it out."
        )
    if state.optimizer_cpu_offload and not state.optimizer_offload_fraction:
        # Megatron's own flag defaults to 1.0, megatron-core's field to 0.0: without it nothing
        # would move.
        raise ConfigError(
            "--optimizer-cpu-offload moves nothing without --optimizer-offload-fraction; add it"
            " (1.0: all)."
        )
    precision_aware = bool(state.use_precision_aware_optimizer)
    if precision_aware and not optimizer.use_distributed_optimizer:
        raise ConfigError(
            "--use-precision-aware-optimizer needs --use-distributed-optimizer; add it."
        )
    for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        dtype = getattr(state, name)
        if dtype not in (None, "fp32") and not precision_aware:
            raise ConfigError(
                f"{flag_of(name)} {dtype} needs --use-precision-aware-optimizer; add it."
            )


def _check_precision(cfg: RunConfig) -> None:
    if cfg.parallel.fp8_format is None:
        for name, value in vars(cfg.transformer).items():
            if "fp8" in name and value:
                raise ConfigError(
                    f"{flag_of(name)} has no effect without --fp8-format; add it, or leave"
                    " this out."
                )
        return
    if not cfg.training.bf16:
        raise ConfigError(
            f"--fp8-format {cfg.parallel.fp8_format} needs --bf16 for all that is not FP8; add it."
        )
    if cfg.model.attention == "sdpa":
        raise ConfigError(
            f"--fp8-format {cfg.parallel.fp8_format} needs TransformerEngine's layers, which"
            " --attention sdpa leaves out; use --attention auto."
        )


def _check_passed_on(cfg: RunConfig, model: ModelConfig) -> None:
    given = cfg.transformer
    if model.language.num_experts is None:
        for name, value in vars(given).items():
            if name.startswith("moe_") and value is not None:
                raise ConfigError(
                    f"--{name.replace('_', '-')} has no effect: {model.name} has no experts; leave"
                    " it out."
                )
    offload, modules = given.fine_grained_activation_offloading, given.offload_modules
    if bool(offload) != bool(modules):
        raise ConfigError(
            "--fine-grained-activation-offloading and --offload-modules belong together; give both"
            " (such as --offload-modules core_attn attn_proj) or neither."
        )


def _check_checkpoints(cfg: RunConfig) -> None:
    files = cfg.checkpoint
    if files.ckpt_step is not None and files.load is None:
        raise ConfigError(
            f"--ckpt-step {files.ckpt_step} chooses a step of --load, which is not set; set it."
        )
    if cfg.data.override_data_state and files.load is None:
        raise ConfigError(
            "--override-data-state is about a run that goes on, but --load is not set; set it."
        )
    if cfg.training.save_interval is not None and files.save is None:
        raise ConfigError(
            f"--save-interval {cfg.training.save_interval} needs --save; set it to a folder."
        )


def _check_profile(cfg: RunConfig, world_size: int) -> None:
    options, defaults = cfg.training, TrainingOptions()
    if not options.profile:
        for name in ("profile_step_start", "profile_step_end", "profile_ranks"):
            if getattr(options, name) != getattr(defaults, name):
                raise ConfigError(
                    f"--{name.replace('_', '-')} has no effect without --profile; add it, or leave"
                    " both out."
                )
        return
    if cfg.checkpoint.save is None:
        raise ConfigError("--profile writes to <save>/trace, but --save is not set; set it.")
    start, end = options.profile_step_start, options.profile_step_end
    if end <= start:
        raise ConfigError(
            f"--profile-step-end is {end}, expected more than --profile-step-start, {start}."
        )
    if end > options.train_iters:
        raise ConfigError(
            f"--profile-step-end {end} is never reached: --train-iters is {options.train_iters};"
            " use at most that."
        )
    for rank in options.profile_ranks:
        if not 0 <= rank < world_size:
            raise ConfigError(f"--profile-ranks {rank}: the run has ranks 0 to {world_size - 1}.")


def _check_reading(data: DataOptions) -> None:
    if data.num_workers == 0 and data.prefetch_steps != DataOptions().prefetch_steps:
        raise ConfigError(
            f"--prefetch-steps {data.prefetch_steps} has no effect without workers; leave it out,"
            " or set --num-workers."
        )
    if (data.data_cache_dir is None) != (data.data_cache_gb is None):
        raise ConfigError(
            f"--data-cache-dir {data.data_cache_dir} and --data-cache-gb {data.data_cache_gb} "
            "belong together; set both."
        )
    if (
        data.data_cache_dir is not None
        and data.data_path
        and not any(
            "://" in path or path.endswith(".json")
            for path in (*data.data_path, *data.valid_data_path)
        )
    ):
        raise ConfigError(
            f"--data-cache-dir {data.data_cache_dir} has no effect: no --data-path is a URL; leave"
            " it out, or write file:///... for a folder of a slow file system."
        )
