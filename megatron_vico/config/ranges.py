"""The ranges of options that are numbers: a whole one is 1 or more unless the table has it."""

import math
from collections.abc import Callable, Iterator, Mapping

from megatron_vico.config.flags import options
from megatron_vico.config.schema import RunConfig, flag_of

_RANGES: Mapping[str, tuple[Callable[[float], bool], str]] = {
    # What is expected: the test, written so that NaN fails it, and the options. None is in order.
    "1 or more": (lambda value: value >= 1, ""),
    "0 or more": (
        lambda value: value >= 0,
        "save_interval num_workers data_retries data_cache_gb seed profile_step_start ckpt_step"
        " lr_warmup_iters min_lr weight_decay clip_grad moe_aux_loss_coeff router_eps"
        " num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 min_offloaded_tensor_size"
        " bad_step_factor",
    ),
    "more than 0": (
        lambda value: value > 0,
        "lr adam_eps gpu_peak_tflops data_timeout_s fp8_max_reference_kl",
    ),
    "a number in [0, 1)": (
        lambda value: 0 <= value < 1,
        "drop_path_rate adam_beta1 adam_beta2",
    ),
    "a number in [0, 1]": (lambda value: 0 <= value <= 1, "max_skipped_share"),
    "a number in [0, 100]": (lambda value: 0 <= value <= 100, "router_percentile"),
}


def range_problems(cfg: RunConfig) -> Iterator[str]:
    """Options whose value is out of range."""
    expected_of = {name: each for each, (_, names) in _RANGES.items() for name in names.split()}
    for name, option in options().items():
        is_count = option.type is int and not option.many
        expected = expected_of.get(name, "1 or more" if is_count else None)
        value = getattr(getattr(cfg, option.section), name)
        if expected is not None and value is not None:
            is_right, _ = _RANGES[expected]
            if not (is_right(value) and math.isfinite(value)):
                yield f"{flag_of(name)} is {value}, expected {expected}."
