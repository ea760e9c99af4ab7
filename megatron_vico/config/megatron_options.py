"""The options that go to megatron-core unread: an allow-list, under the names of Megatron's flags.

Unset, each keeps the value that this project or else megatron-core gives it. A field here is a flag
and a recipe key like any other, the comment beside or above it its help text;
config/megatron_kwargs.py says which field of megatron-core it sets where the name differs.
"""

from dataclasses import dataclass
from typing import Literal

Switch = bool | None


@dataclass(frozen=True, kw_only=True)
class TransformerOptions:
    """Passed on to megatron-core's TransformerConfig of the language model."""

    # Pipeline:

    decoder_first_pipeline_num_layers: int | None = None  # Layers of the first pipeline stage.
    decoder_last_pipeline_num_layers: int | None = None  # Layers of the last pipeline stage.
    account_for_embedding_in_pipeline_split: Switch = None  # Count the embedding as a layer.
    account_for_loss_in_pipeline_split: Switch = None  # Count the loss as a layer.
    # The layers of every stage (or chunk) in words, such as Et*2|t*33L.
    pipeline_model_parallel_layout: str | None = None
    # Microbatches that a chunk of the interleaved schedule runs in a row; the pipeline's size.
    microbatch_group_size_per_virtual_pipeline_stage: int | None = None
    # Overlap point-to-point communication in the pipeline's warm-up and flush too.
    overlap_p2p_communication_warmup_flush: Switch = None

    # Attention and fused kernels:

    # Which attention kernel TransformerEngine runs.
    attention_backend: Literal["flash", "fused", "unfused", "local", "auto"] | None = None
    flash_attention_version: Literal[2, 3, 4] | None = None  # Which FlashAttention that is.
    # How context-parallel ranks exchange keys and values; packed documents take p2p only.
    cp_comm_type: str | None = None
    rope_fusion: Switch = None  # Rotary embedding in one kernel; unset, on a GPU.
    bias_swiglu_fusion: Switch = None  # SwiGLU in one kernel; unset, on a GPU.
    bias_dropout_fusion: Switch = None  # Bias, dropout, residual in one kernel; unset, on a GPU.
    # Add weight gradients of TransformerEngine's layers in the product that makes them, in fp32.
    gradient_accumulation_fusion: Switch = None
    # The experts' all-to-all on a stream of high priority.
    high_priority_a2a_comm_stream: Switch = None
    deterministic_mode: Switch = None  # Only kernels that give the same bits each time.

    # Number formats:

    fp32_residual_connection: Switch = None  # Keep the residual stream in fp32.
    # Keep bf16 matrix products from reducing in bf16.
    disable_bf16_reduced_precision_matmul: Switch = None
    fp8_param_gather: Switch = None  # Keep the parameters in FP8 and gather them so.
    fp8_wgrad: Switch = None  # Compute weight gradients in FP8 too.
    fp8_dot_product_attention: Switch = None  # Attention's products in FP8.
    tp_only_amax_red: Switch = None  # Reduce FP8 scales over tensor-parallel ranks only.
    first_last_layers_bf16: Switch = None  # Keep the first and last layers in bf16 under FP8.
    num_layers_at_start_in_bf16: int | None = None  # How many first layers those are.
    num_layers_at_end_in_bf16: int | None = None  # How many last layers those are.

    # Experts:

    moe_grouped_gemm: Switch = None  # All experts of a rank in one grouped matrix product.
    # Sort tokens by expert, and back, in one kernel; unset, where there is TransformerEngine.
    moe_permute_fusion: Switch = None
    # The expert router's softmax, top-k and loss in one kernel; unset, where there is
    # TransformerEngine.
    moe_router_fusion: Switch = None
    # Number format of the expert router; unset, fp32.
    moe_router_dtype: Literal["fp32", "fp64"] | None = None
    # Which balancing loss; unset, aux_loss where --moe-aux-loss-coeff is not 0.
    moe_router_load_balancing_type: (
        Literal["aux_loss", "seq_aux_loss", "global_aux_loss", "none"] | None
    ) = None
    # Route a few tokens more, so that each expert's count suits FP8.
    moe_router_padding_for_quantization: Switch = None
    moe_router_force_load_balancing: Switch = None  # Route at random, for timings only.
    moe_z_loss_coeff: float | None = None  # Weight of the loss that keeps router logits small.

    # Memory:

    # Spread the saved inputs of recomputed layers over the tensor-parallel ranks.
    distribute_saved_activations: Switch = None
    # Keep the activations of --offload-modules in host memory until the backward pass.
    fine_grained_activation_offloading: Switch = None
    offload_modules: tuple[str, ...] | None = None  # Which those are, such as core_attn attn_proj.
    min_offloaded_tensor_size: int | None = None  # Elements of the smallest tensor that moves.
    activation_offload_fraction: float | None = None  # Share of them that moves, in [0, 1].

    # Start and noise:

    init_method_std: float | None = None  # Spread of fresh weights; unset, by the width.
    initialization: Switch = None  # Whether fresh weights get values at all.
    hidden_dropout: float | None = None  # Dropout after attention and MLP; unset, 0.
    attention_dropout: float | None = None  # Dropout of attention weights; unset, 0.


@dataclass(frozen=True, kw_only=True)
class OptimizerStateOptions:
    """Passed on to megatron-core's OptimizerConfig: how and where AdamW's state is kept."""

    # TransformerEngine's AdamW, whose state takes the formats below.
    use_precision_aware_optimizer: Switch = None
    main_grads_dtype: Literal["fp32", "bf16"] | None = None  # Gradients.
    main_params_dtype: Literal["fp32", "fp16"] | None = None  # Master weights.
    # The gradient's running mean.
    exp_avg_dtype: Literal["fp32", "bf16", "fp16", "fp8"] | None = None
    # The squared gradient's running mean.
    exp_avg_sq_dtype: Literal["fp32", "bf16", "fp16", "fp8"] | None = None
    optimizer_cpu_offload: Switch = None  # Keep state in host memory and step there.
    # Share of the state that is kept there, in [0, 1].
    optimizer_offload_fraction: float | None = None
    use_torch_optimizer_for_cpu_offload: Switch = None  # torch's AdamW for that share.
    overlap_cpu_optimizer_d2h_h2d: Switch = None  # Copy gradients and weights while it steps.
    pin_cpu_grads: Switch = None  # Page-locked memory for its gradients.
    pin_cpu_params: Switch = None  # Page-locked memory for its weights.


@dataclass(frozen=True, kw_only=True)
class DdpOptions:
    """Passed on to megatron-core's DistributedDataParallelConfig: how gradients are reduced."""

    # Add and reduce gradients in fp32; unset, on.
    accumulate_allreduce_grads_in_fp32: Switch = None
    ddp_bucket_size: int | None = None  # Parameters whose gradients are reduced in one go.
    ddp_pad_buckets_for_high_nccl_busbw: Switch = None  # Pad buckets to sizes that NCCL is fast at.
    ddp_reduce_scatter_with_fp32_accumulation: Switch = None  # Send bf16 and add in fp32.
    # Parameters whose gradients are added in fp32 on each rank, as patterns of names.
    ddp_param_name_patterns_for_fp32_local_accumulation: tuple[str, ...] | None = None
    align_param_gather: Switch = None  # Let all pipeline stages gather parameters at the same time.
    check_for_nan_in_loss_and_grad: Switch = None  # End the run at a gradient that is not a number.
    check_for_large_grads: Switch = None  # End the run at a gradient that is unusually large.
