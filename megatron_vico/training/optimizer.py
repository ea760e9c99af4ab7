"""AdamW over language model and encoder as one: one clipping norm, rates per module."""

from collections.abc import Mapping

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vico.config.megatron_kwargs import megatron_kwargs
from megatron_vico.config.schema import OptimizerOptions, RunConfig, TrainingOptions
from megatron_vico.errors import ConfigError
from megatron_vico.parallel.groups import Groups
from megatron_vico.training.bad_steps import GuardedOptimizer
from megatron_vico.training.policy import Policy


def build_optimizer(policy: Policy, cfg: RunConfig, *, groups: Groups) -> GuardedOptimizer:
    """Megatron's optimizers of the two modules, chained: the gradient norm is that of both."""
    options, lr_factors, config = cfg.optimizer, cfg.stage.lr_factors, optimizer_config(cfg)
    parts: list[
        tuple[list[DistributedDataParallel], ProcessGroupCollection, Mapping[str, float]]
    ] = []
    if policy.language_ddp:
        patterns = {"*": lr_factors.get("language_model", 1.0)}
        parts.append((list(policy.language_ddp), groups.language, patterns))
    if policy.encoder_ddp is not None:
        patterns = {
            f"*{name}.*": factor for name, factor in lr_factors.items() if name != "language_model"
        }
        parts.append(([policy.encoder_ddp], groups.encoder, patterns))
    chained: list[MegatronOptimizer] = []
    for chunks, module_groups, factors in parts:
        built = get_megatron_optimizer(
            config,
            chunks,
            config_overrides={**get_standard_config_overrides(config), **_rates(factors, options)},
            use_gloo_process_groups=False,
            pg_collection=module_groups,
        )
        chained += getattr(built, "chained_optimizers", [built])
    return GuardedOptimizer(chained)


def optimizer_config(cfg: RunConfig) -> OptimizerConfig:
    """megatron-core's configuration; ConfigError if it needs an Adam that is not installed."""
    # On a CPU the stand-in has another.
    torch_adam = torch.cuda.is_available() and megatron_optimizer.USING_PYTORCH_OPTIMIZER
    if torch_adam and cfg.optimizer.use_distributed_optimizer:
        raise ConfigError(
            "--use-distributed-optimizer: megatron-core cannot load the state of torch's AdamW"
            " again, and found no other; install TransformerEngine (`vico doctor` says what keeps"
            " one from being used), or leave the flag out."
        )
    bf16 = cfg.training.bf16
    return OptimizerConfig(
        optimizer="adam",
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        # With it, megatron-core saves the low bits of the masters as if they were the masters.
        store_param_remainders=False,
        **megatron_kwargs(cfg, OptimizerConfig),
    )


def _rates(
    factors: Mapping[str, float], options: OptimizerOptions
) -> dict[ParamKey, ParamGroupOverride]:
    return {
        ParamKey(name=pattern): ParamGroupOverride(
            max_lr=options.lr * factor, min_lr=options.min_lr * factor
        )
        for pattern, factor in factors.items()
        if factor != 1.0
    }


def build_scheduler(
    optimizer: MegatronOptimizer, options: OptimizerOptions, training: TrainingOptions
) -> OptimizerParamScheduler:
    """Linear warm-up and decay of the learning rate by optimizer steps; constant weight decay."""
    decay_steps = (
        options.lr_decay_iters if options.lr_decay_iters is not None else training.train_iters
    )
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=options.lr_warmup_iters,
        lr_decay_steps=decay_steps,
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=training.train_iters,
        wd_incr_style="constant",
        # The command line wins over what a checkpoint says: a resumed run may be told to go on
        # longer.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
