"""FLOPs of the models by formula, of a step of each stage, and what a pack is expected to cost.

A multiplication and its addition are two FLOPs; norms, activations and embeddings are left out.
Divided by a time and the device's rate these give MFU; as estimates they tell cheap from
expensive packs (data/pack/balance.py).
"""

from megatron_vico.config.registry import LanguageConfig, ModelConfig, VisionConfig
from megatron_vico.config.schema import StageOptions
from megatron_vico.data.pack.balance import PackCost
from megatron_vico.data.samples import PackedBatch, PackedStream


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


def step_flops(model: ModelConfig, options: StageOptions, pack: PackedBatch) -> float:
    """FLOPs of a pack in a step, as it was drawn: vision, reference, policy and heads, all passes.

    What recomputation does again is left out, and ViR, which sees one tile a sample (below 1 %).
    """
    spec, trained = options.spec, options.trained
    # A backward pass costs twice the forward pass; without gradients of weights, linear layers cost
    # it once. Attention has no weights.
    backward = spec.plans != "one_tile"
    linear = 1 + backward + ("language_model" in trained)
    attention = 1 + 2 * backward
    flops = (
        float(vit_flops_per_tile(model.vision)) * pack.num_tiles * (3 if "vit" in trained else 1)
    )
    for stream in pack.policies or (pack.reference,):
        flops += _language_flops(model.language, stream, linear=linear, attention=attention)
        num_compressed = int(stream.compressed.sum())
        for name, tiles in (
            ("connector_4x", pack.num_tiles - num_compressed),
            ("connector_16x", num_compressed),
        ):
            passes = 1 + ("vit" in trained) + (name in trained)
            flops += passes * tiles * _connector_flops_per_tile(model, name)
    if spec.needs_reference:
        flops += _language_flops(model.language, pack.reference, linear=1, attention=1)
        flops += pack.num_tiles * _connector_flops_per_tile(model, "connector_4x")
        if "vit" in trained:
            flops += pack.num_tiles * vit_flops_per_tile(model.vision)
    return flops


def _language_flops(
    config: LanguageConfig, stream: PackedStream, *, linear: int, attention: int
) -> float:
    """Of all layers and, on the response rows, of the head."""
    lengths = stream.cu_seqlens.diff().double()
    head = 2 * config.hidden_size * config.vocab_size * len(stream.response_rows)
    return linear * (
        language_flops_per_token(config) * float(lengths.sum()) + head
    ) + attention * attention_flops_per_token_squared(config) * float(lengths.square().sum())


def _connector_flops_per_tile(model: ModelConfig, name: str) -> int:
    """Forward FLOPs of the connector's linear layers: twice their weights for each visual token."""
    counts, d, h = model.parameter_counts(), model.vision.hidden_size, model.language.hidden_size
    if name == "connector_4x":
        return 2 * (counts.connector_4x - 8 * d - 2 * h) * model.visual_tokens_per_tile
    return 2 * (counts.connector_16x - 32 * d - 5 * h) * model.compressed_tokens_per_tile
