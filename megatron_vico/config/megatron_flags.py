"""The one table of how Megatron's flags come in: which are renamed, and which are refused, with the
reason.

Everything else that is a field of megatron-core's TransformerConfig (of the language model),
OptimizerConfig or DistributedDataParallelConfig is passed on as it is. A test holds this table
against Megatron's own parser.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Mapping
from typing import Any, Literal

from megatron_vico.config.options import Option, field_options

TRANSFORMER, OPTIMIZER, DDP = "transformer_overrides", "optimizer_overrides", "ddp_overrides"

RENAMED: Mapping[str, tuple[tuple[str, str], ...]] = {
    # option: (section, field) of megatron-core. Several fields: one flag sets them all.
    "accumulate_allreduce_grads_in_fp32": ((DDP, "grad_reduce_in_fp32"),),
    "bias_swiglu_fusion": ((TRANSFORMER, "bias_activation_fusion"),),
    "check_for_nan_in_loss_and_grad": ((DDP, "check_for_nan_in_grad"),),
    "ddp_bucket_size": ((DDP, "bucket_size"),),
    "ddp_pad_buckets_for_high_nccl_busbw": ((DDP, "pad_buckets_for_high_nccl_busbw"),),
    "ddp_param_name_patterns_for_fp32_local_accumulation": (
        (DDP, "param_name_patterns_for_fp32_local_accumulation"),
    ),
    "ddp_reduce_scatter_with_fp32_accumulation": ((DDP, "reduce_scatter_with_fp32_accumulation"),),
    "decoder_first_pipeline_num_layers": ((TRANSFORMER, "num_layers_in_first_pipeline_stage"),),
    "decoder_last_pipeline_num_layers": ((TRANSFORMER, "num_layers_in_last_pipeline_stage"),),
    "fp8_param_gather": ((TRANSFORMER, "fp8_param"), (DDP, "fp8_param_gather")),
    "initialization": ((TRANSFORMER, "perform_initialization"),),
    "microbatch_group_size_per_virtual_pipeline_stage": (
        (TRANSFORMER, "microbatch_group_size_per_vp_stage"),
    ),
    "overlap_p2p_communication_warmup_flush": ((TRANSFORMER, "overlap_p2p_comm_warmup_flush"),),
    "rope_fusion": ((TRANSFORMER, "apply_rope_fusion"),),
}

_DTYPE = Literal["fp32", "bf16", "fp16", "fp8"]
KINDS: Mapping[str, Any] = {
    # Fields whose own annotation (a Union, a torch.dtype) says less than their flag takes.
    "cp_comm_type": str | None,
    "exp_avg_dtype": _DTYPE,
    "exp_avg_sq_dtype": _DTYPE,
    "main_grads_dtype": Literal["fp32", "bf16"],
    "main_params_dtype": Literal["fp32", "fp16"],
    "moe_router_load_balancing_type": Literal[
        "aux_loss", "seq_aux_loss", "global_aux_loss", "none"
    ],
    "param_name_patterns_for_fp32_local_accumulation": tuple[str, ...],
    "pipeline_model_parallel_layout": str | None,
}

_SIZE = "fixed by --model-size; sizes are names, never numbers"
_TRAINER = "set by the trainer, which relies on its value"
_PROFILER = "--profile is torch's profiler; run the trainer under nsys for more"
_LOGGING = "training/metrics.py decides what is logged: a log line, TensorBoard and metrics.jsonl"
_PACKS = "the data are packed conversations in WebDataset shards; see --data-path and --seq-length"
_ITERATIONS = (
    "runs and schedules are counted in optimizer steps; see --train-iters and --lr-decay-iters"
)
_CHECKPOINTS = (
    "checkpoints are written in one way (torch_dist, whole state); see --save, --load and"
    " --pretrained-checkpoint"
)
_ADAMW = "the optimizer is AdamW, as in the paper (section 4.1)"
_FSDP = "weights are not sharded by FSDP; shard optimizer state with --use-distributed-optimizer"
_NO_GRAPHS = "packs have unequal lengths, and CUDA graphs need fixed ones"
_NO_EVAL = (
    "validation is --valid-data-path with --eval-interval and --eval-iters, and never trains or"
    " generates; answers are scored by `vico evaluate`"
)
_INFERENCE = "an option of Megatron's inference engine; use `vico generate`"
_NOT_HERE = "no part of ViCO training"
_RESILIENCE = "restarts are left to the launcher; a run resumes from --load"
_DISPATCHER = (
    "unequal sequence lengths need the alltoall dispatcher, and this belongs to the flex one"
)

REFUSED: Mapping[str, str] = {
    # Pattern of flags and fields, with underscores and without leading dashes: why it is refused.
    # First match counts. What the model is.
    "num_layers": _SIZE,
    "encoder_num_layers": _SIZE,
    "decoder_num_layers": _SIZE,
    "hidden_size": _SIZE,
    "*ffn_hidden_size": _SIZE,
    "num_attention_heads": _SIZE,
    "num_query_groups": _SIZE,
    "group_query_attention": _SIZE,
    "kv_channels": _SIZE,
    "softmax_*": _SIZE,
    "window_*": _SIZE,
    "max_position_embeddings": _SIZE,
    "*position_embedding*": _SIZE,
    "yarn_*": _SIZE,
    "relative_attention_*": _SIZE,
    "rotary_*": _SIZE,
    "*rope_scaling*": _SIZE,
    "rope_type": _SIZE,
    "no_rope_freq": _SIZE,
    "mscale*": _SIZE,
    "mrope_section": _SIZE,
    "*vocab_size*": _SIZE,
    "*norm_epsilon": _SIZE,
    "*layernorm_1p": _SIZE,
    "layernorm_zero_centered_gamma": _SIZE,
    "*post_layernorm": _SIZE,
    "normalization": _SIZE,
    "*bias_linear": _SIZE,
    "add_qkv_bias": _SIZE,
    "qk_*": _SIZE,
    "attention_output_gate": _SIZE,
    "openai_gelu": _SIZE,
    "swiglu": _SIZE,
    "quick_geglu": _SIZE,
    "*squared_relu": _SIZE,
    "glu_linear_offset": _SIZE,
    "activation_func*": _SIZE,
    "gated_linear_unit": _SIZE,
    "untie_embeddings_and_output_weights": "embeddings of InternVL3.5 are untied in every size",
    "num_experts": _SIZE,
    "num_moe_experts": _SIZE,
    "*shared_expert*": _SIZE,
    "moe_router_topk*": _SIZE,
    "moe_router_num_groups": _SIZE,
    "moe_router_group_topk": _SIZE,
    "moe_router_pre_softmax": _SIZE,
    "moe_router_score_function": _SIZE,
    "moe_router_enable_expert_bias": _SIZE,
    "moe_router_bias_update_rate": _SIZE,
    "moe_router_quantile_balancing_ema": _SIZE,
    "moe_apply_probs_on_input": _SIZE,
    "moe_latent_size": _SIZE,
    "moe_layer_freq": _SIZE,
    "moe_mlp_glu_interleave_size": _SIZE,
    "mtp_*": "InternVL3.5 has no multi-token prediction",
    "multi_latent_attention": _SIZE,
    "*mla*": _SIZE,
    "*_lora_rank": _SIZE,
    "v_head_dim": _SIZE,
    "*experimental*": _SIZE,
    "dsa_*": _SIZE,
    "linear_*": _SIZE,
    "*mamba*": _SIZE,
    "*hybrid*": _SIZE,
    "*heter[eo]*": _SIZE,
    "*mup*": _SIZE,
    "spec": "layer specs are chosen by models/build.py; see --attention",
    "transformer_impl": "layer specs are chosen by models/build.py; see --attention",
    "use_flash_attn": "chosen by --attention-backend",
    "use_mcore_models": "all models are megatron-core's",
    "*init_method_xavier_uniform": (
        "released weights are loaded; training from scratch starts from --init-method-std"
    ),
    "*init_method": (
        "released weights are loaded; training from scratch starts from --init-method-std"
    ),
    "init_model_with_meta_device": _FSDP,
    "apply_query_key_layer_scaling": "a remedy for fp16, which is not offered; use --bf16",
    "bias_gelu_fusion": "the fused form is the tanh GELU; InternVL's is erf",
    # What the steps and schedules of this trainer decide themselves.
    "calculate_per_token_loss": _TRAINER,
    "variable_seq_lengths": _TRAINER,
    "deallocate_pipeline_outputs": _TRAINER,
    "*pipeline_dtype": _TRAINER,
    "params_dtype": _TRAINER,
    "*autocast*": _TRAINER,
    "timers": _TRAINER,
    "*_func": _TRAINER,
    "*_context": _TRAINER,
    "batch_p2p_*": _TRAINER,
    "overlap_p2p_comm": _TRAINER,
    "overlap_p2p_communication": (
        "set by the layout: the interleaved schedule gives wrong gradients without it"
    ),
    "use_ring_exchange_p2p": (
        "needs a PyTorch built for it; point-to-point communication is set by the layout"
    ),
    "virtual_pipeline_model_parallel_size": "use --num-layers-per-virtual-pipeline-stage",
    "num_virtual_stages_per_pipeline_rank": (
        "use --num-layers-per-virtual-pipeline-stage, uneven stages too"
    ),
    "model_parallel_size": "use --tensor-model-parallel-size",
    "average_in_collective": _TRAINER,
    "ddp_average_in_collective": _TRAINER,
    "ddp_num_buckets": "use --ddp-bucket-size",
    "num_buckets": "use --ddp-bucket-size",
    "grad_reduce_in_bf16": "use --no-accumulate-allreduce-grads-in-fp32",
    "align_grad_reduce": _TRAINER,
    "*cross_entropy*": (
        "the losses are ViCO's own, in vico/consistency.py and vico/router_targets.py"
    ),
    "*embedding_wgrad*": (
        "the loss reads the output layer itself, so its weight gradient cannot be put off"
    ),
    "wgrad_deferral_limit": (
        "the loss reads the output layer itself, so its weight gradient cannot be put off"
    ),
    "*delay_wgrad*": (
        "part of the combined 1F1B schedule, which would take the forward step over from ViCO"
    ),
    "*moe_expert_parallel_comm": (
        "part of the combined 1F1B schedule, which would take the forward step over from ViCO"
    ),
    "*with_experts_wgrad": (
        "part of the combined 1F1B schedule, which would take the forward step over from ViCO"
    ),
    "ep_overlap_*": (
        "part of the combined 1F1B schedule, which would take the forward step over from ViCO"
    ),
    "overlap_param_gather_with_optimizer_step": (
        "not wired into this training loop; see --overlap-param-gather"
    ),
    "tp_comm_*": "TransformerEngine's communication buffers are not started by this trainer",
    "*num_weight_shards": "weights are sharded by tensor, pipeline and expert parallelism only",
    "*gtp_*": "weights are sharded by tensor, pipeline and expert parallelism only",
    "hierarchical_context_parallel_sizes": (
        "context parallelism has one level; see --context-parallel-size"
    ),
    "max_seqlen_per_dp_cp_rank": "context parallelism has one level; see --context-parallel-size",
    "num_distributed_optimizer_instances": (
        "optimizer state is sharded over all data-parallel ranks"
    ),
    "recompute_activations": "use --recompute-granularity selective",
    "checkpoint_activations": "use --recompute-granularity",
    "moe_layer_recompute": "use --recompute-granularity selective --recompute-modules moe",
    "cpu_offloading*": "use --fine-grained-activation-offloading with --offload-modules",
    "moe_paged_stash*": "use --fine-grained-activation-offloading with --offload-modules",
    "moe_expert_rank_capacity_factor": _NO_GRAPHS,
    "*cuda_graph*": _NO_GRAPHS,
    "*te_rng_tracker": _NO_GRAPHS,
    "moe_enable_deepep": _DISPATCHER,
    "moe_flex_*": _DISPATCHER,
    "moe_deepep_*": _DISPATCHER,
    "*hybridep*": _DISPATCHER,
    "moe_ncclep_*": _DISPATCHER,
    "moe_enable_routing_replay": _NOT_HERE,
    "moe_use_upcycling": "released weights are loaded as they are",
    "moe_upcycling_granularity": "released weights are loaded as they are",
    "moe_per_layer_logging": _LOGGING,
    "moe_routing_trace_*": _LOGGING,
    # Number formats.
    "fp16": "loss scaling is not part of the loop; use --bf16",
    "*loss_scale*": "loss scaling is not part of the loop; use --bf16",
    "hysteresis": "loss scaling is not part of the loop; use --bf16",
    "fp4*": "FP4 is not offered; see --fp8-format",
    "reuse_grad_buf_for_mxfp8_param_ag": "the MXFP8 recipe is not offered; see --fp8-recipe",
    "fp8": "use --fp8-format",
    "fp8_margin": "belongs to delayed scaling, which is wrong with two models in one process",
    "fp8_interval": "belongs to delayed scaling, which is wrong with two models in one process",
    "fp8_amax_*": "belongs to delayed scaling, which is wrong with two models in one process",
    "fp8_quantizer_factory": "the FP8 recipes offered are those of --fp8-recipe",
    "fp8_output_proj": "logits are kept in fp32: a rounded one spoils the gradient of a tiny KL",
    "*kitchen*": "the FP8 recipes offered are those of --fp8-recipe",
    "quant_recipe": "the FP8 recipes offered are those of --fp8-recipe",
    "te_precision_config_file": "the FP8 recipes offered are those of --fp8-recipe",
    "onnx_safe": _NOT_HERE,
    # Optimizer and schedule.
    "optimizer": _ADAMW,
    "decoupled_weight_decay": _ADAMW,
    "sgd_*": _ADAMW,
    "*muon_*": _ADAMW,
    "lion_*": _ADAMW,
    "soap_*": _ADAMW,
    "use_layer_wise_*": _ADAMW,
    "decoupled_*lr": "use --lr-mult",
    "head_lr_mult": "use --lr-mult",
    "freeze_all_layers": "use --train-modules",
    "warmup": "use --lr-warmup-iters",
    "lr_warmup_*": "use --lr-warmup-iters",
    "lr_wsd_*": "use --lr-decay-style",
    "*_samples": _ITERATIONS,
    "*_opt_param_scheduler": (
        "a resumed run continues its schedule; a new one starts from --pretrained-checkpoint"
    ),
    "*_weight_decay": "weight decay is constant; see --weight-decay",
    "weight_decay_incr_style": "weight decay is constant; see --weight-decay",
    "no_weight_decay_cond_type": "biases and one-dimensional weights have no weight decay",
    "dump_param_to_param_group_map": _LOGGING,
    "*barrier_with_*": "the loop has no timers",
    # Loop, batch sizes, data.
    "micro_batch_size": "a microbatch is one pack; its size is --seq-length",
    "batch_size": "use --global-batch-size",
    "rampup_batch_size": "the batch size is constant; see --global-batch-size",
    "step_batch_size_schedule": "the batch size is constant; see --global-batch-size",
    "decrease_batch_size_if_needed": "the batch size is constant; see --global-batch-size",
    "empty_unused_memory_level": (
        "the loop never empties the allocator's cache; set PYTORCH_CUDA_ALLOC_CONF instead"
    ),
    "train_sync_interval": "the step has no synchronisation of its own",
    "exit_*": "use --exit-interval",
    "manual_gc*": "Python's garbage collector is left alone",
    "iterations_to_skip": "broken samples are named and stop the run; they are not skipped by step",
    "eval_*": _NO_EVAL,
    "*_eval_*": _NO_EVAL,
    "*validation*": _NO_EVAL,
    "skip_train": _NO_EVAL,
    "test_mode": _NO_EVAL,
    "split": _PACKS,
    "*data_path": _PACKS,
    "*data_args_path": _PACKS,
    "*sequences_path": _PACKS,
    "data_cache_path": _PACKS,
    "object_storage_cache_path": _PACKS,
    "*dataloader*": _PACKS,
    "*mmap*": _PACKS,
    "mock_data": _PACKS,
    "*coder_seq_length": _PACKS,
    "sample_rate": _PACKS,
    "mask_*": _PACKS,
    "short_seq_prob": _PACKS,
    "reset_*": _PACKS,
    "eod_mask_loss": _PACKS,
    "num_dataset_builder_threads": _PACKS,
    "mid_level_dataset_surplus": _PACKS,
    "allow_ambiguous_pad_tokens": _PACKS,
    "phase_transition_iterations": _PACKS,
    "fim_*": _PACKS,
    "sft*": _PACKS,
    "data_sharding": _PACKS,
    "*msc": _PACKS,
    "vocab_*": "use --tokenizer-model",
    "merge_file": "use --tokenizer-model",
    "*tokenizer_*": "use --tokenizer-model",
    "tiktoken_*": "use --tokenizer-model (tools/build_tokenizer.py reads tiktoken files)",
    "trust_remote_code": "no remote code is run",
    "chat_template": "the conversation template is InternVL's own",
    # Checkpoints, restarts, processes.
    "finetune": "use --pretrained-checkpoint, which loads weights only",
    "no_save_*": _CHECKPOINTS,
    "no_load_*": _CHECKPOINTS,
    "*save_*interval": _CHECKPOINTS,
    "load_main_params_from_ckpt": _CHECKPOINTS,
    "non_persistent_*": _CHECKPOINTS,
    "*_checkpoint_args": _CHECKPOINTS,
    "exit_on_missing_checkpoint": _CHECKPOINTS,
    "*ckpt*": _CHECKPOINTS,
    "*strict_fsdp*": _CHECKPOINTS,
    "async_*": _CHECKPOINTS,
    "use_persistent_ckpt_worker": _CHECKPOINTS,
    "replication*": _CHECKPOINTS,
    "distrib_optim_*": _CHECKPOINTS,
    "verify_integrity": _CHECKPOINTS,
    "distributed_backend": "NCCL on GPUs, gloo on CPUs",
    "distributed_timeout_seconds_after_init": "use --distributed-timeout-minutes",
    "local_rank": "given by torchrun",
    "lazy_mpu_init": _TRAINER,
    "fake_process_group": "use --check with --world-size to check a layout without its GPUs",
    "gloo_process_groups": _TRAINER,
    "nccl_communicator_config_path": _TRAINER,
    "use_tp_pp_dp_mapping": "the order of ranks is tp-cp-ep-dp-pp",
    "*sharp*": _TRAINER,
    "high_priority_stream_groups": _TRAINER,
    "create_all_gather_group": _FSDP,
    "*fsdp*": _FSDP,
    "*hsdp": _FSDP,
    "data_parallel_sharding_strategy": _FSDP,
    "outer_dp_sharding_strategy": _FSDP,
    "*gradient_reduce_div_fusion": _FSDP,
    "suggested_communication_unit_size": _FSDP,
    "keep_fp8_transpose_cache": _FSDP,
    "*nccl_ub": _FSDP,
    "symmetric_registration": _FSDP,
    "jit_fuser": "set TORCH_COMPILE_DISABLE=1 instead",
    "flight_recorder_*": "set TORCH_FR_BUFFER_SIZE and its kin instead",
    "data_parallel_random_init": "data-parallel ranks start equal",
    "adlr_*": _RESILIENCE,
    "inprocess_*": _RESILIENCE,
    "enable_ft_package": _RESILIENCE,
    "calc_ft_timeouts": _RESILIENCE,
    "ft_num_warmup_iters": _RESILIENCE,
    "error_injection_*": _RESILIENCE,
    "fault_injector_*": _RESILIENCE,
    "rerun_mode": _RESILIENCE,
    "check_for_spiky_loss": _RESILIENCE,
    "result_rejected_tracker_filename": _RESILIENCE,
    "gpu_sniff_test_interval": _RESILIENCE,
    "check_weight_hash_*": _RESILIENCE,
    "*straggler*": _RESILIENCE,
    "run_workload_inspector_server": _RESILIENCE,
    # Logging and profiling.
    "*log_*": _LOGGING,
    "logging_level": _LOGGING,
    "timing_log_*": _LOGGING,
    "tensorboard_*": _LOGGING,
    "wandb_*": _LOGGING,
    "*one_logger*": _LOGGING,
    "app_tag_*": _LOGGING,
    "config_logger_dir": _LOGGING,
    "logits_*": "the reference runs in the same process; no logits are stored",
    "*pytorch_profiler*": _PROFILER,
    "record_*": _PROFILER,
    "memory_snapshot_path": _PROFILER,
    "nvtx_ranges": _PROFILER,
    # Other programs that share Megatron's parser.
    "inference_*": _INFERENCE,
    "*inference*": _INFERENCE,
    "use_legacy_static_engine": _INFERENCE,
    "max_tokens_to_oom": _INFERENCE,
    "flash_decode": _INFERENCE,
    "batch_invariant_mode": _INFERENCE,
    "symmetric_ar_type": _INFERENCE,
    "nccl_all_reduce_for_prefill": _INFERENCE,
    "mlp_chunks_for_prefill": _INFERENCE,
    "enable_chunked_prefill": _INFERENCE,
    "num_speculative_tokens": _INFERENCE,
    "*sampling_seed*": _INFERENCE,
    "rl_*": _NOT_HERE,
    "perform_rl_step": _NOT_HERE,
    "grpo_*": _NOT_HERE,
    "langrl_*": _NOT_HERE,
    "refit_method": _NOT_HERE,
    "*bert_*": _NOT_HERE,
    "ict_*": _NOT_HERE,
    "biencoder_*": _NOT_HERE,
    "query_in_block_prob": _NOT_HERE,
    "use_one_sent_docs": _NOT_HERE,
    "retriever_*": _NOT_HERE,
    "embedding_path": _NOT_HERE,
    "indexer_*": _NOT_HERE,
    "num_classes": _NOT_HERE,
    "img_*": _NOT_HERE,
    "num_channels": _NOT_HERE,
    "patch_dim": _NOT_HERE,
    "*classes_fraction": _NOT_HERE,
    "data_per_class_fraction": _NOT_HERE,
    "vision_*": _NOT_HERE,
    "swin_*": _NOT_HERE,
    "dino_*": _NOT_HERE,
    "iter_per_epoch": _NOT_HERE,
    "yaml_cfg": "use --recipe",
}


def refusal(name: str) -> str | None:
    """Why an option of Megatron is refused.

    Args:
        name: of a flag, with underscores, without leading dashes; `no_` and `disable_` may lead.

    Returns:
        The reason, or None where the table has no row for it.
    """
    bare = name.removeprefix("no_").removeprefix("disable_")
    rows = (
        row for row in REFUSED if fnmatch.fnmatchcase(name, row) or fnmatch.fnmatchcase(bare, row)
    )
    row = next(rows, None)
    return None if row is None else REFUSED[row]


def option_of(section: str, field: str) -> str:
    """The option that sets a field of megatron-core.

    Args:
        section: TRANSFORMER, OPTIMIZER or DDP.
        field: of that config class.

    Returns:
        The key in a recipe.
    """
    return next((name for name, targets in RENAMED.items() if (section, field) in targets), field)


def flag_of(section: str, field: str) -> str:
    """As `option_of`, but as written on the command line."""
    return "--" + option_of(section, field).replace("_", "-")


@functools.cache
def passed_on() -> dict[str, Option]:
    """The options that go to megatron-core's config classes unread, by name; imports megatron
    (seconds)."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    fields: dict[tuple[str, str], Option] = {}
    for section, config_class in (
        (TRANSFORMER, TransformerConfig),
        (OPTIMIZER, OptimizerConfig),
        (DDP, DistributedDataParallelConfig),
    ):
        for name, option in field_options(section, config_class, KINDS).items():
            fields[section, name] = option
    options: dict[str, Option] = {}
    renamed = {target for targets in RENAMED.values() for target in targets}
    for name, targets in RENAMED.items():
        options[name] = _under(name, targets, fields)
    for section, name in fields:
        if (section, name) not in renamed and name not in options and refusal(name) is None:
            targets = tuple(place for place in fields if place[1] == name)
            options[name] = _under(name, targets, fields)
    return options


def _under(
    name: str, targets: tuple[tuple[str, str], ...], fields: Mapping[tuple[str, str], Option]
) -> Option:
    return dataclasses.replace(fields[targets[0]], name=name, targets=targets)
