"""The ranges of options that are numbers, as one table."""

import math
from collections.abc import Callable, Iterator, Mapping

from megatron_vico.config.flags import options
from megatron_vico.config.schema import RunConfig, flag_of

_RANGES: Mapping[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    # What is expected: the test, written so that NaN fails it, and the options. None is in order.
    "1 or more": (
        lambda value: value >= 1,
        (
            "seq_length",
            "max_tiles_per_pack",
            "max_samples_per_pack",
            "packing_window",
            "shuffle_shards",
            "max_dynamic_patch",
            "prefetch_steps",
            "train_iters",
            "global_batch_size",
            "log_interval",
            "save_interval",
            "exit_interval",
            "eval_interval",
            "eval_iters",
            "distributed_timeout_minutes",
            "lr_decay_iters",
            "router_window",
            "encoder_chunk_tiles",
            "kl_chunk_rows",
            "recompute_num_layers",
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "num_layers_per_virtual_pipeline_stage",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
            "decoder_first_pipeline_num_layers",
            "decoder_last_pipeline_num_layers",
        ),
    ),
    "0 or more": (
        lambda value: value >= 0,
        (
            "num_workers",
            "data_retries",
            "data_cache_gb",
            "seed",
            "profile_step_start",
            "ckpt_step",
            "lr_warmup_iters",
            "min_lr",
            "weight_decay",
            "clip_grad",
            "moe_aux_loss_coeff",
            "router_eps",
        ),
    ),
    "more than 0": (lambda value: value > 0, ("lr", "adam_eps")),
    "a number in [0, 1)": (
        lambda value: 0 <= value < 1,
        ("drop_path_rate", "adam_beta1", "adam_beta2"),
    ),
    "a number in [0, 1]": (lambda value: 0 <= value <= 1, ("max_skipped_share",)),
    "a number in [0, 100]": (lambda value: 0 <= value <= 100, ("router_percentile",)),
}


def range_problems(cfg: RunConfig) -> Iterator[str]:
    """Options whose value is out of range."""
    for expected, (is_right, names) in _RANGES.items():
        for name in names:
            value = getattr(getattr(cfg, options()[name].section), name)
            if value is not None and not (is_right(value) and math.isfinite(value)):
                yield f"{flag_of(name)} is {value}, expected {expected}."
