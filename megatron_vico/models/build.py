"""Builds the two modules of a model, and the megatron-core configurations they are built from.

Two modules never share a TransformerConfig: mcore keeps schedule hooks and loss scales in it.
"""

import functools
import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_with_transformer_engine_submodules,
    get_mlp_module_spec_for_backend,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from megatron.core.utils import get_pg_rank

from megatron_vico.config.megatron_kwargs import megatron_kwargs
from megatron_vico.config.pipeline_split import virtual_stages
from megatron_vico.config.registry import ModelConfig
from megatron_vico.config.schema import RunConfig
from megatron_vico.models.attention import SDPACoreAttention
from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.models.language_model import LanguageModel, VocabularyHead
from megatron_vico.models.layers import Experts, Layer
from megatron_vico.models.norms import RMSNorm

# Megatron's default: the vocabulary is padded to a multiple of this times the tensor-parallel size.
_VOCAB_MULTIPLE = 128


def language_transformer_config(
    model: ModelConfig, cfg: RunConfig | None = None, **overrides: Any
) -> TransformerConfig:
    """A new configuration of a model's language model; `overrides` are fields of it."""
    language, cfg = model.language, cfg or RunConfig()
    on_gpu, engine = torch.cuda.is_available(), transformer_engine_usable()
    fields: dict[str, Any] = {
        "num_layers": language.num_layers,
        "hidden_size": language.hidden_size,
        "ffn_hidden_size": language.ffn_hidden_size,
        "num_attention_heads": language.num_heads,
        "num_query_groups": language.num_query_groups,
        "kv_channels": language.head_dim,
        "layernorm_epsilon": language.norm_eps,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "bias_activation_fusion": on_gpu,
        "bias_dropout_fusion": on_gpu,
        "apply_rope_fusion": engine,
        "deallocate_pipeline_outputs": True,
    }
    if language.num_experts is not None:
        fields |= {
            "num_moe_experts": language.num_experts,
            "moe_router_topk": language.moe_top_k,
            "moe_ffn_hidden_size": language.moe_ffn_hidden_size,
            # Softmax over the chosen experts' logits: the same as softmax, top-k, renormalise.
            "moe_router_pre_softmax": False,
            "moe_router_dtype": "fp32",
            "moe_router_load_balancing_type": "none",
            "moe_permute_fusion": engine,
            "moe_router_fusion": engine,
        }
    fields |= _common_fields(language.hidden_size, bf16=cfg.training.bf16)
    fields |= _parallel_fields(model, cfg)
    return TransformerConfig(**(fields | megatron_kwargs(cfg, TransformerConfig) | overrides))


def vision_transformer_config(
    model: ModelConfig, *, bf16: bool = False, drop_path_rate: float = 0.0, **overrides: Any
) -> TransformerConfig:
    """A new configuration of a model's vision tower; it is replicated, so it has no layout.

    The drop path rate, that of the last layer, in [0, 1), becomes an attribute of it.
    """
    vision = model.vision
    fields: dict[str, Any] = {
        "num_layers": vision.num_layers,
        "hidden_size": vision.hidden_size,
        "ffn_hidden_size": vision.ffn_hidden_size,
        "num_attention_heads": vision.num_heads,
        "kv_channels": vision.hidden_size // vision.num_heads,
        "layernorm_epsilon": vision.norm_eps,
        "normalization": "LayerNorm" if vision.norm_type == "layer_norm" else "RMSNorm",
        "qk_layernorm": vision.qk_norm,
        "add_bias_linear": True,
        "add_qkv_bias": vision.qkv_bias,
        "gated_linear_unit": False,
        "activation_func": F.gelu,
        # mcore's fused bias-GELU is the tanh form; InternViT has erf.
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
    }
    fields |= _common_fields(vision.hidden_size, bf16=bf16)
    config = TransformerConfig(**(fields | overrides))
    config.drop_path_rate = drop_path_rate
    return config


def build_vision_encoder(
    model: ModelConfig,
    config: TransformerConfig,
    *,
    pg_collection: ProcessGroupCollection | None = None,
) -> VisionEncoder:
    """A model's vision tower, connectors and router, with fresh weights.

    `config`, from `vision_transformer_config`, serves no other module; groups of TP, PP and CP have
    one rank each (None: mcore's own).
    """
    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    assert groups.tp.size() == 1, "the vision encoder is replicated: give it groups of one rank"
    return VisionEncoder(config, model=model, pg_collection=groups)


def build_language_model(
    model: ModelConfig,
    config: TransformerConfig,
    *,
    pg_collection: ProcessGroupCollection | None = None,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    attention: Literal["auto", "sdpa"] = "auto",
    head_chunk_rows: int = 512,
) -> LanguageModel:
    """One pipeline chunk of a model's language model, with fresh weights.

    Args:
        config: from `language_transformer_config`, used by no other module.
        pre_process: whether the chunk has the embedding.
        post_process: whether the chunk has the final norm and the head.
        vp_stage: index among the chunks of its rank, with interleaving.
        attention: "auto" takes TransformerEngine's layers where there are CUDA,
            TransformerEngine and a 16-bit format; "sdpa", and "auto" elsewhere, mcore's local
            layers with torch's attention.
        head_chunk_rows: rows whose logits exist at once when a loss is taken.
    """
    groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
    engine = takes_transformer_engine(config, attention)
    # megatron-core's own linear layers, such as the head that GPTModel makes, need apex for it.
    fuse, config.gradient_accumulation_fusion = config.gradient_accumulation_fusion, False
    spec = _transformer_engine_layer(config, fuse) if engine else _local_layer(config)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=get_pg_rank(groups.pp))
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[spec] * num_layers, layer_norm=RMSNorm
        ),
        vocab_size=padded_vocab_size(model.language.vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=model.language.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=False,
        # Without TransformerEngine, attention.py rotates.
        position_embedding_type="rope" if engine else "none",
        rotary_base=int(model.language.rope_theta),
        pg_collection=groups,
        vp_stage=vp_stage,
    )
    if post_process:
        gpt.output_layer = VocabularyHead(
            config.hidden_size,
            gpt.vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            tp_group=groups.tp,
        )
        gpt.setup_embeddings_and_output_layer()
    config.gradient_accumulation_fusion = fuse
    for name, param in gpt.named_parameters():
        if ".experts." in name:
            # Megatron's mark of what has gradient buffers and an optimizer of its own. It sets it
            # at EP > 1 only, and a checkpoint of EP 1 would not load into other optimizers there.
            param.allreduce = False
    return LanguageModel(
        gpt,
        language=model.language,
        layout="te" if engine else "sdpa",
        head_chunk_rows=head_chunk_rows,
    )


def build_language_chunks(
    model: ModelConfig,
    config: TransformerConfig,
    *,
    pg_collection: ProcessGroupCollection,
    attention: Literal["auto", "sdpa"] = "auto",
    head_chunk_rows: int = 512,
) -> tuple[LanguageModel, ...]:
    """A pipeline rank's chunks in the order of their layers; several when interleaved.

    Arguments as in `build_language_model`.
    """
    stage, num_stages = pg_collection.pp.rank(), pg_collection.pp.size()
    num_chunks = config.virtual_pipeline_model_parallel_size
    return tuple(
        build_language_model(
            model,
            config,
            pg_collection=pg_collection,
            pre_process=stage == 0 and chunk == 0,
            post_process=stage == num_stages - 1 and chunk == (num_chunks or 1) - 1,
            vp_stage=None if num_chunks is None else chunk,
            attention=attention,
            head_chunk_rows=head_chunk_rows,
        )
        for chunk in range(num_chunks or 1)
    )


def padded_vocab_size(vocab_size: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding and of the head, over all tensor-parallel ranks."""
    multiple = _VOCAB_MULTIPLE * tensor_parallel_size
    return math.ceil(vocab_size / multiple) * multiple


def transformer_engine_usable() -> bool:
    """Whether there are both a CUDA device and a TransformerEngine that megatron-core imported."""
    return torch.cuda.is_available() and HAVE_TE


def takes_transformer_engine(config: TransformerConfig, attention: Literal["auto", "sdpa"]) -> bool:
    """Whether a language model gets TransformerEngine's layers.

    Not in fp32: for that they have neither a flash nor a cuDNN attention, but one that pads a pack
    to documents x longest x longest, and their products are TF32.
    """
    return (
        attention == "auto" and config.params_dtype != torch.float32 and transformer_engine_usable()
    )


def _common_fields(hidden_size: int, *, bf16: bool) -> dict[str, Any]:
    dtype = torch.bfloat16 if bf16 else torch.float32
    return {
        "bf16": bf16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Megatron's 0.02 at a width of 1024; the toys are narrower and start from scratch.
        "init_method_std": math.sqrt(2 / (5 * hidden_size)),
        # Losses come with their weight in the global batch: gradients are summed, never averaged.
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "cuda_graph_modules": [],  # mcore warns about its own default
    }


def _parallel_fields(model: ModelConfig, cfg: RunConfig) -> dict[str, Any]:
    """Fields that follow from the layout and the model together."""
    # The host need not wait for the device at every hop of a pipeline: megatron-core asks for it
    # because of a fault of older versions of torch.
    fields: dict[str, Any] = {"variable_seq_lengths": True, "batch_p2p_sync": False}
    chunks = virtual_stages(cfg, model.language)
    if chunks is not None:
        fields["virtual_pipeline_model_parallel_size"] = chunks
        # Batched sends and receives pair up wrongly at two stages, without an error.
        fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if cfg.parallel.moe_aux_loss_coeff and model.language.num_experts is not None:
        fields["moe_router_load_balancing_type"] = "aux_loss"
        fields["moe_aux_loss_coeff"] = cfg.parallel.moe_aux_loss_coeff
    return fields


def _transformer_engine_layer(config: TransformerConfig, fuse: bool) -> ModuleSpec:
    submodules = get_gpt_layer_with_transformer_engine_submodules(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=True,
    )
    spec = _layer(config, submodules)
    spec.params = {"fuse_weight_gradients": fuse}
    return spec


def _local_layer(config: TransformerConfig) -> ModuleSpec:
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SDPACoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=RMSNorm,
            k_layernorm=RMSNorm,
        ),
    )
    # Checkpoints have TransformerEngine's names, so that one written on a CPU loads on a GPU and
    # back. There the norm is part of the linear layer behind it, except that an MoE layer keeps its
    # pre_mlp_layernorm (mcore's own map of its local layers renames that one too, wrongly).
    names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if config.num_moe_experts is None:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    submodules = TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=RMSNorm,
        mlp=get_mlp_module_spec_for_backend(
            backend=LocalSpecProvider(), num_experts=config.num_moe_experts
        ),
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=names,
    )
    return _layer(config, submodules)


def _layer(config: TransformerConfig, submodules: TransformerLayerSubmodules) -> ModuleSpec:
    if config.num_moe_experts is not None:
        submodules.mlp = functools.partial(Experts, **submodules.mlp.keywords)
    return ModuleSpec(module=Layer, submodules=submodules)
