"""The table: each tensor of the Megatron model beside its name in the three layouts of InternVL3.5.

Layouts: `internvl` is the remote-code format, `hf` is transformers' own on disk, `flash` is
`internvl` plus connector_16x and ViR. The table is read in both directions; a new model family is
new rows. Names on the Megatron side are those on the disk, which are TransformerEngine's, with the
numbers of layer and expert put in: megatron-core stores a parameter of all layers (and all experts)
as one tensor, under the name without them.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_vico.config.registry import LanguageConfig, ModelConfig, VisionConfig
from megatron_vico.convert.names.kinds import (
    DIRECT,
    GatedMLP,
    JoinedQKV,
    Mapping,
    PaddedVocabulary,
    SplitQKV,
)
from megatron_vico.convert.options import Layout

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Files:
    """Where one layout keeps a Megatron tensor."""

    names: tuple[str, ...]
    kind: Mapping = DIRECT


@dataclass(frozen=True, kw_only=True)
class Row:
    """One tensor of the Megatron model, or with {layer} and {expert} in its names one for each."""

    megatron: str
    shape: Shape
    """The Megatron tensor's."""

    internvl: Files | None
    """None where the layout has no such tensor."""

    hf: Files | None
    flash: Files | None
    num_layers: int = 1
    num_experts: int = 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One Megatron tensor and its file tensors in one layout: a row without placeholders."""

    megatron: str
    shape: Shape
    files: tuple[str, ...]
    """Empty where the layout has no such tensor."""

    kind: Mapping
    key: str
    """What it is stored under: the name without the numbers of layer and expert."""

    index: tuple[int, ...]
    """Where in the tensor of that key: (), (layer,) or (layer, expert)."""

    counts: tuple[int, ...]
    """How many there are of each."""

    @property
    def file_shapes(self) -> tuple[Shape, ...]:
        """Shapes of the file tensors, in the order of their names."""
        if not self.files:
            return ()
        parts = self.kind.to_hf(torch.empty(self.shape, device="meta"))
        return tuple(tuple(part.shape) for part in parts)


def table(model: ModelConfig, *, padded_vocab_size: int | None = None) -> tuple[Row, ...]:
    """All tensors of a model.

    Args:
        model: the size.
        padded_vocab_size: rows of the Megatron model's embedding and output layer; unset, no more
            than the vocabulary.

    Returns:
        The rows, in the order of a forward pass.
    """
    vision, language = model.vision, model.language
    return (
        *_vit_rows(vision),
        *_connector_4x_rows(vision.hidden_size, language.hidden_size),
        *_connector_16x_rows(vision.hidden_size, language.hidden_size),
        *_vir_rows(vision.hidden_size),
        *_language_rows(language, padded_vocab_size or language.vocab_size),
    )


def entries(
    model: ModelConfig, *, layout: Layout, padded_vocab_size: int | None = None
) -> dict[str, Entry]:
    """The table of one layout, an entry for each tensor of the Megatron model, by its name.

    They are in the order of the table, layers and experts counted up; arguments as for `table`.
    """
    found = {}
    for row in table(model, padded_vocab_size=padded_vocab_size):
        files: Files = getattr(row, layout) or Files(())
        limits = [
            count
            for placeholder, count in (("{layer}", row.num_layers), ("{expert}", row.num_experts))
            if placeholder in row.megatron
        ]
        for index in itertools.product(*map(range, limits)):
            numbers = dict(zip(("layer", "expert"), index, strict=False))
            name = row.megatron.format(**numbers)
            found[name] = Entry(
                megatron=name,
                shape=row.shape,
                files=tuple(each.format(**numbers) for each in files.names),
                kind=files.kind,
                key=row.megatron.replace(".{layer}", "").replace(".{expert}", ""),
                index=index,
                counts=tuple(limits),
            )
    return found


def _everywhere(
    megatron: str,
    shape: Shape,
    *names: str,
    kind: Mapping = DIRECT,
    layers: int = 1,
    experts: int = 1,
) -> Row:
    files = Files(names, kind)
    return Row(
        megatron=megatron,
        shape=shape,
        internvl=files,
        hf=files,
        flash=files,
        num_layers=layers,
        num_experts=experts,
    )


def _vision(
    megatron: str, shape: Shape, internvl: str | Files, hf: str | Files, *, layers: int = 1
) -> Row:
    remote = Files((internvl,)) if isinstance(internvl, str) else internvl
    native = Files((hf,)) if isinstance(hf, str) else hf
    return Row(
        megatron=megatron, shape=shape, internvl=remote, hf=native, flash=remote, num_layers=layers
    )


def _flash_only(megatron: str, shape: Shape, name: str) -> Row:
    return Row(megatron=megatron, shape=shape, internvl=None, hf=None, flash=Files((name,)))


def _vit_rows(config: VisionConfig) -> Iterator[Row]:
    d, f, patch = config.hidden_size, config.ffn_hidden_size, config.patch_size
    shape: Shape
    vit, remote, native = "encoder.vit.", "vision_model.embeddings.", "vision_tower.embeddings."
    projection = native + "patch_embeddings.projection."
    yield _vision(vit + "class_token", (1, 1, d), remote + "class_embedding", native + "cls_token")
    for end, shape in (("weight", (d, 3, patch, patch)), ("bias", (d,))):
        yield _vision(
            f"{vit}patch_embedding.{end}", shape, f"{remote}patch_embedding.{end}", projection + end
        )
    positions = (1, 1 + config.num_patches, d)
    yield _vision(
        vit + "position_embedding",
        positions,
        remote + "position_embedding",
        native + "position_embeddings",
    )

    layer, remote, native = (
        "encoder.vit.transformer.layers.{layer}.",
        "vision_model.encoder.layers.{layer}.",
        "vision_tower.encoder.layer.{layer}.",
    )
    num_layers = config.num_layers
    yield from _vit_qkv_rows(
        config, layer + "self_attention.", remote + "attn.", native + "attention."
    )
    norm_ends = ("weight", "bias") if config.norm_type == "layer_norm" else ("weight",)
    same: tuple[tuple[str, Shape, str, str], ...] = (
        *(
            (f"input_layernorm.{end}", (d,), f"norm1.{end}", f"layernorm_before.{end}")
            for end in norm_ends
        ),
        (
            "self_attention.linear_proj.weight",
            (d, d),
            "attn.proj.weight",
            "attention.projection_layer.weight",
        ),
        (
            "self_attention.linear_proj.bias",
            (d,),
            "attn.proj.bias",
            "attention.projection_layer.bias",
        ),
        ("self_attn_bda.scale", (d,), "ls1", "lambda_1"),
        *(
            (f"pre_mlp_layernorm.{end}", (d,), f"norm2.{end}", f"layernorm_after.{end}")
            for end in norm_ends
        ),
        ("mlp.linear_fc1.weight", (f, d), "mlp.fc1.weight", "mlp.fc1.weight"),
        ("mlp.linear_fc1.bias", (f,), "mlp.fc1.bias", "mlp.fc1.bias"),
        ("mlp.linear_fc2.weight", (d, f), "mlp.fc2.weight", "mlp.fc2.weight"),
        ("mlp.linear_fc2.bias", (d,), "mlp.fc2.bias", "mlp.fc2.bias"),
        ("mlp_bda.scale", (d,), "ls2", "lambda_2"),
    )
    for megatron, shape, remote_name, native_name in same:
        yield _vision(
            layer + megatron, shape, remote + remote_name, native + native_name, layers=num_layers
        )


def _vit_qkv_rows(config: VisionConfig, attention: str, remote: str, native: str) -> Iterator[Row]:
    d, heads, num_layers = config.hidden_size, config.num_heads, config.num_layers
    head_dim = d // heads
    joined = JoinedQKV(num_heads=heads, head_dim=head_dim)
    split = SplitQKV(num_heads=heads, num_query_groups=heads, head_dim=head_dim)
    shapes: dict[str, Shape] = {"weight": (3 * d, d)}
    if config.qkv_bias:
        shapes["bias"] = (3 * d,)
    for end, shape in shapes.items():
        yield _vision(
            f"{attention}linear_qkv.{end}",
            shape,
            Files((f"{remote}qkv.{end}",), joined),
            Files(tuple(f"{native}{part}_proj.{end}" for part in "qkv"), split),
            layers=num_layers,
        )
    for part in "qk" if config.qk_norm else "":
        megatron, name = f"{attention}{part}_layernorm.weight", f"{part}_norm.weight"
        yield _vision(megatron, (d,), remote + name, native + name, layers=num_layers)


def _connector_4x_rows(d: int, h: int) -> Iterator[Row]:
    for megatron, remote, native, out, in_ in (
        ("norm", "0", "layer_norm", 4 * d, None),
        ("linear_1", "1", "linear_1", h, 4 * d),
        ("linear_2", "3", "linear_2", h, h),
    ):
        for end, shape in _weight_and_bias(out, in_):
            name = f"encoder.connector_4x.{megatron}.{end}"
            yield _vision(
                name, shape, f"mlp1.{remote}.{end}", f"multi_modal_projector.{native}.{end}"
            )


def _connector_16x_rows(d: int, h: int) -> Iterator[Row]:
    for megatron, remote, out, in_ in (
        ("norm", "0", 16 * d, None),
        ("linear_1", "1", 2 * h, 16 * d),
        ("linear_2", "4", 2 * h, 2 * h),
        ("linear_3", "7", h, 2 * h),
    ):
        for end, shape in _weight_and_bias(out, in_):
            yield _flash_only(
                f"encoder.connector_16x.{megatron}.{end}", shape, f"mlp2.{remote}.{end}"
            )


def _vir_rows(d: int) -> Iterator[Row]:
    # attn3, attn4, norm3 and norm4 are in every released checkpoint though no forward pass uses
    # them.
    shape: Shape
    pooling, gating = "encoder.vir.pooling.", "encoder.vir.gating."
    remote = "pooling_before_gating."
    yield _flash_only(pooling + "query_token", (1, d), remote + "query_token")
    for n in range(1, 5):
        for name, shape in (
            (f"attn{n}.in_proj_weight", (3 * d, d)),
            (f"attn{n}.in_proj_bias", (3 * d,)),
            (f"attn{n}.out_proj.weight", (d, d)),
            (f"attn{n}.out_proj.bias", (d,)),
            (f"norm{n}.weight", (d,)),
            (f"norm{n}.bias", (d,)),
        ):
            yield _flash_only(pooling + name, shape, remote + name)
    for n in range(1, 5):
        for index, out, in_ in ((0, 4 * d, d), (3, d, 4 * d), (5, d, None)):
            for end, shape in _weight_and_bias(out, in_):
                yield _flash_only(
                    f"{gating}block{n}.{index}.{end}", shape, f"gating.block{n}.{index}.{end}"
                )
    for index, out, in_ in ((0, d, None), (1, 2, d)):
        for end, shape in _weight_and_bias(out, in_):
            yield _flash_only(f"{gating}gate.{index}.{end}", shape, f"gating.gate.{index}.{end}")


def _weight_and_bias(out: int, in_: int | None) -> tuple[tuple[str, Shape], ...]:
    """Names and shapes of a linear layer's parameters; without an input width, a LayerNorm's."""
    return ("weight", (out,) if in_ is None else (out, in_)), ("bias", (out,))


def _language_rows(config: LanguageConfig, padded_vocab_size: int) -> Iterator[Row]:
    h, heads, groups, width = (
        config.hidden_size,
        config.num_heads,
        config.num_query_groups,
        config.head_dim,
    )
    num_layers = config.num_layers
    gpt, file = "language_model.gpt.", "language_model.model."
    layer, file_layer = gpt + "decoder.layers.{layer}.", file + "layers.{layer}."
    vocabulary = PaddedVocabulary(vocab_size=config.vocab_size, padded_vocab_size=padded_vocab_size)
    qkv = SplitQKV(num_heads=heads, num_query_groups=groups, head_dim=width)

    def each(
        megatron: str, shape: Shape, *names: str, kind: Mapping = DIRECT, experts: int = 1
    ) -> Row:
        names = tuple(file_layer + name for name in names)
        return _everywhere(
            layer + megatron, shape, *names, kind=kind, layers=num_layers, experts=experts
        )

    embedding = (padded_vocab_size, h)
    yield _everywhere(
        gpt + "embedding.word_embeddings.weight",
        embedding,
        file + "embed_tokens.weight",
        kind=vocabulary,
    )
    # TransformerEngine's norms are part of the linear layer behind them, but for the one before the
    # experts.
    qkv_norm, dense = "self_attention.linear_qkv.layer_norm_weight", config.num_experts is None
    mlp_norm = "mlp.linear_fc1.layer_norm_weight" if dense else "pre_mlp_layernorm.weight"
    yield each(qkv_norm, (h,), "input_layernorm.weight")
    names = tuple(f"self_attn.{part}_proj.weight" for part in "qkv")
    yield each(
        "self_attention.linear_qkv.weight", ((heads + 2 * groups) * width, h), *names, kind=qkv
    )
    yield each("self_attention.q_layernorm.weight", (width,), "self_attn.q_norm.weight")
    yield each("self_attention.k_layernorm.weight", (width,), "self_attn.k_norm.weight")
    yield each("self_attention.linear_proj.weight", (h, heads * width), "self_attn.o_proj.weight")
    yield each(mlp_norm, (h,), "post_attention_layernorm.weight")
    if config.num_experts is None:
        mlp, file_mlp, f, experts = "mlp.", "mlp.", config.ffn_hidden_size, 1
    else:
        assert config.moe_ffn_hidden_size is not None, "a model with experts has a width for them"
        mlp, file_mlp, f = (
            "mlp.experts.experts.{expert}.",
            "mlp.experts.{expert}.",
            config.moe_ffn_hidden_size,
        )
        experts = config.num_experts
        yield each("mlp.router.weight", (experts, h), "mlp.gate.weight")
    names = (file_mlp + "gate_proj.weight", file_mlp + "up_proj.weight")
    yield each(mlp + "linear_fc1.weight", (2 * f, h), *names, kind=GatedMLP(), experts=experts)
    yield each(mlp + "linear_fc2.weight", (h, f), file_mlp + "down_proj.weight", experts=experts)
    yield _everywhere(gpt + "decoder.final_layernorm.weight", (h,), file + "norm.weight")
    yield _everywhere(
        gpt + "output_layer.weight", embedding, "language_model.lm_head.weight", kind=vocabulary
    )
