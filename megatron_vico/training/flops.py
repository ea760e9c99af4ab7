"""FLOPs of the models by formula, and what a pack costs in a step of each stage.

A multiplication and its addition are two FLOPs; norms, activations and embeddings are left out.
Divided by a time and the device's rate these give MFU; as estimates they tell cheap from
expensive packs (data/pack/balance.py).
"""

from megatron_vico.config.registry import LanguageConfig, ModelConfig, VisionConfig
from megatron_vico.config.schema import StageOptions
from megatron_vico.data.pack.balance import PackCost


def language_flops_per_token(config: LanguageConfig) -> int:
    """Forward FLOPs of a token in all linear layers but the head: twice the parameters it meets.

    With experts these are the router and the `moe_top_k` experts that a token is sent to.
    """
    h, width = config.hidden_size, config.head_dim
    attention = h * width * (2 * config.num_heads + 2 * config.num_query_groups)
    if config.num_experts is None:
        mlp = 3 * h * config.ffn_hidden_size
    else:
        assert config.moe_ffn_hidden_size is not None
        mlp = h * config.num_experts + config.moe_top_k * 3 * h * config.moe_ffn_hidden_size
    return 2 * config.num_layers * (attention + mlp)


def attention_flops_per_token_squared(config: LanguageConfig) -> int:
    """Forward FLOPs of causal attention in all layers over the square of a sample's length.

    Scores and their product with the values take 2 FLOPs a pair and channel each; causal kernels
    skip half the pairs.
    """
    return 4 * config.num_layers * config.num_heads * config.head_dim // 2


def vit_flops_per_tile(config: VisionConfig) -> int:
    """Forward FLOPs of the vision tower for one tile; its attention is not causal."""
    d, num_tokens = config.hidden_size, config.num_patches + 1
    linear = 2 * (4 * d * d + 2 * d * config.ffn_hidden_size) * num_tokens
    embedding = 2 * 3 * config.patch_size**2 * d * config.num_patches
    return config.num_layers * (linear + 4 * d * num_tokens**2) + embedding


def pack_cost(model: ModelConfig, options: StageOptions) -> PackCost:
    """What a pack costs the ranks of one model replica, in FLOPs.

    A frozen vision tower runs once for reference and policy. Connectors, head and recomputation are
    left out: they are a few per cent, and nearly the same fraction of every pack.
    """
    trained = options.trained
    reference = 1 if options.spec.needs_reference else 0
    if options.spec.plans == "one_tile":
        # Reference and twice the policy, forward only; one tile a sample compressed is as good as
        # none.
        full, compressed = 3.0, 0.0
    else:
        # Through a frozen language model the backward pass finds gradients of activations only.
        policy = 3.0 if "language_model" in trained else 2.0
        full, compressed = (1.0, policy) if reference else (policy, 0.0)
    return PackCost(
        per_token=float(language_flops_per_token(model.language)),
        per_token_squared=float(attention_flops_per_token_squared(model.language)),
        per_tile=float(
            vit_flops_per_tile(model.vision) * (3 + reference if "vit" in trained else 1)
        ),
        full_passes=full,
        compressed_passes=compressed,
        # xi ~ U[0, 1] compresses half of the tiles.
        saved_per_tile=(model.visual_tokens_per_tile - model.compressed_tokens_per_tile) / 2,
    )
