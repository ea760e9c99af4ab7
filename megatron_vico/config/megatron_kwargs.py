"""The one way of an option to megatron-core: which field of which of its config classes it sets."""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from megatron_vico.config.schema import RunConfig

TRANSFORMER, OPTIMIZER = "TransformerConfig", "OptimizerConfig"
DDP = "DistributedDataParallelConfig"

SECTIONS: Mapping[str, str] = {
    # Section of RunConfig -> the config class that its options set, under their own names.
    "parallel": TRANSFORMER,
    "transformer": TRANSFORMER,
    "optimizer": OPTIMIZER,
    "optimizer_state": OPTIMIZER,
    "ddp": DDP,
}

FIELDS: Mapping[str, tuple[tuple[str, str], ...]] = {
    # Options of those sections that set another class, or a field of another name, or several.
    "use_distributed_optimizer": (
        (OPTIMIZER, "use_distributed_optimizer"),
        (DDP, "use_distributed_optimizer"),
    ),
    "overlap_grad_reduce": ((DDP, "overlap_grad_reduce"),),
    "overlap_param_gather": ((DDP, "overlap_param_gather"),),
    "fp8_format": ((TRANSFORMER, "fp8"),),
    "fp8_recipe": ((TRANSFORMER, "fp8_recipe"), (OPTIMIZER, "fp8_recipe")),
    "fp8_param_gather": ((TRANSFORMER, "fp8_param"), (DDP, "fp8_param_gather")),
    "decoder_first_pipeline_num_layers": ((TRANSFORMER, "num_layers_in_first_pipeline_stage"),),
    "decoder_last_pipeline_num_layers": ((TRANSFORMER, "num_layers_in_last_pipeline_stage"),),
    "microbatch_group_size_per_virtual_pipeline_stage": (
        (TRANSFORMER, "microbatch_group_size_per_vp_stage"),
    ),
    "overlap_p2p_communication_warmup_flush": ((TRANSFORMER, "overlap_p2p_comm_warmup_flush"),),
    "rope_fusion": ((TRANSFORMER, "apply_rope_fusion"),),
    "bias_swiglu_fusion": ((TRANSFORMER, "bias_activation_fusion"),),
    "initialization": ((TRANSFORMER, "perform_initialization"),),
    "accumulate_allreduce_grads_in_fp32": ((DDP, "grad_reduce_in_fp32"),),
    "check_for_nan_in_loss_and_grad": ((DDP, "check_for_nan_in_grad"),),
    "ddp_bucket_size": ((DDP, "bucket_size"),),
    "ddp_pad_buckets_for_high_nccl_busbw": ((DDP, "pad_buckets_for_high_nccl_busbw"),),
    "ddp_reduce_scatter_with_fp32_accumulation": ((DDP, "reduce_scatter_with_fp32_accumulation"),),
    "ddp_param_name_patterns_for_fp32_local_accumulation": (
        (DDP, "param_name_patterns_for_fp32_local_accumulation"),
    ),
    # models/build.py turns these into fields, which depend on the model too.
    "num_layers_per_virtual_pipeline_stage": (),
    "moe_aux_loss_coeff": (),
    # The schedule of the learning rate, built by training/optimizer.py.
    "lr_warmup_iters": (),
    "lr_decay_style": (),
    "lr_decay_iters": (),
}


def fields_of(section: str, option: str) -> tuple[tuple[str, str], ...]:
    """(config class, field) of each field of megatron-core that an option of a section sets."""
    return FIELDS.get(option, ((SECTIONS[section], option),))


def megatron_kwargs(cfg: RunConfig, config_class: type) -> dict[str, Any]:
    """What a run sets in one of megatron-core's config classes, in that class's own types.

    Args:
        cfg: the run.
        config_class: TransformerConfig (of the language model), OptimizerConfig or
            DistributedDataParallelConfig.

    Returns:
        Keyword arguments: words become torch dtypes and members of enums, tuples become lists;
        options that are unset are left out.
    """
    types = {field.name: field.type for field in dataclasses.fields(config_class)}
    kwargs = {}
    for section in SECTIONS:
        for option, value in vars(getattr(cfg, section)).items():
            for class_name, field in fields_of(section, option):
                if class_name == config_class.__name__ and value not in (None, ()):
                    kwargs[field] = _megatron_value(value, types[field], field)
    if cfg.parallel.fp8_format is None:
        kwargs.pop("fp8_recipe", None)
    return kwargs


def _megatron_value(value: object, megatron_type: Any, field: str) -> Any:
    if isinstance(value, str) and "torch.dtype" in str(megatron_type):
        import torch

        names = {
            "fp32": torch.float32,
            "bf16": torch.bfloat16,
            "fp16": torch.float16,
            "fp8": torch.uint8,  # what megatron-core's optimizer takes for FP8 moments
        }
        return names[value]
    if isinstance(value, str) and isinstance(megatron_type, enum.EnumMeta):
        return megatron_type[value]
    if isinstance(value, tuple) and "Tuple" not in str(megatron_type):
        return list(value)
    return value
