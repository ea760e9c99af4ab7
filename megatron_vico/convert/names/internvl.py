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
from typing import NamedTuple

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

_BOTH = (".weight", ".bias")
_ONE = ("",)
"""A parameter that has no module of its own."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One Megatron tensor and its file tensors in one layout."""

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


class _Row(NamedTuple):
    """An entry, or with {layer} and {expert} in its names one for each of them."""

    megatron: str
    shape: Shape
    files: tuple[str, ...]
    kind: Mapping = DIRECT
    counts: tuple[int, ...] = ()


def entries(
    model: ModelConfig, *, layout: Layout, padded_vocab_size: int | None = None
) -> dict[str, Entry]:
    """The table of one layout: an entry for each tensor of the Megatron model, by its name.

    In the order of a forward pass, layers and experts counted up. Embedding and output layer have
    `padded_vocab_size` rows; unset, no more than the vocabulary.
    """
    found = {}
    for row in _rows(model, layout, padded_vocab_size or model.language.vocab_size):
        for index in itertools.product(*map(range, row.counts)):
            numbers = dict(zip(("layer", "expert"), index, strict=False))
            name = row.megatron.format(**numbers)
            found[name] = Entry(
                megatron=name,
                shape=row.shape,
                files=tuple(file.format(**numbers) for file in row.files),
                kind=row.kind,
                key=row.megatron.replace(".{layer}", "").replace(".{expert}", ""),
                index=index,
                counts=row.counts,
            )
    return found


def _rows(model: ModelConfig, layout: Layout, padded_vocab_size: int) -> Iterator[_Row]:
    vision, language = model.vision, model.language
    d, h, is_native = vision.hidden_size, language.hidden_size, layout == "hf"
    yield from _vit_rows(vision, is_native)
    for megatron, shape, remote, native in (
        ("norm", (4 * d,), "0", "layer_norm"),
        ("linear_1", (h, 4 * d), "1", "linear_1"),
        ("linear_2", (h, h), "3", "linear_2"),
    ):
        name = f"multi_modal_projector.{native}" if is_native else f"mlp1.{remote}"
        yield from _each("encoder.connector_4x." + megatron, shape, name)
    for row in (*_connector_16x_rows(d, h), *_vir_rows(d)):
        yield row if layout == "flash" else row._replace(files=())
    yield from _language_rows(language, padded_vocab_size)


def _each(
    megatron: str,
    shape: Shape,
    name: str,
    *,
    ends: tuple[str, ...] = _BOTH,
    counts: tuple[int, ...] = (),
) -> Iterator[_Row]:
    """A row for each parameter of a module; a bias has the weight's first dimension."""
    for end in ends:
        of_end = shape[:1] if end.endswith("bias") else shape
        yield _Row(megatron + end, of_end, (name + end,), counts=counts)


def _vit_rows(config: VisionConfig, is_native: bool) -> Iterator[_Row]:
    d, f, p = config.hidden_size, config.ffn_hidden_size, config.patch_size
    norm = _BOTH if config.norm_type == "layer_norm" else _BOTH[:1]
    tokens = 1 + config.num_patches
    modules: tuple[tuple[str, Shape, str, str, tuple[str, ...]], ...] = (
        ("class_token", (1, 1, d), "class_embedding", "cls_token", _ONE),
        ("patch_embedding", (d, 3, p, p), "patch_embedding", "patch_embeddings.projection", _BOTH),
        (
            "position_embedding",
            (1, tokens, d),
            "position_embedding",
            "position_embeddings",
            _ONE,
        ),
    )
    start = "vision_tower.embeddings." if is_native else "vision_model.embeddings."
    for megatron, shape, remote, native, ends in modules:
        name = start + (native if is_native else remote)
        yield from _each("encoder.vit." + megatron, shape, name, ends=ends)

    layer, counts = "encoder.vit.transformer.layers.{layer}.", (config.num_layers,)
    start = "vision_tower.encoder.layer." if is_native else "vision_model.encoder.layers."
    start += "{layer}."
    yield from _vit_qkv_rows(config, layer + "self_attention.", start, is_native)
    modules = (
        ("input_layernorm", (d,), "norm1", "layernorm_before", norm),
        ("self_attention.linear_proj", (d, d), "attn.proj", "attention.projection_layer", _BOTH),
        ("self_attn_bda.scale", (d,), "ls1", "lambda_1", _ONE),
        ("pre_mlp_layernorm", (d,), "norm2", "layernorm_after", norm),
        ("mlp.linear_fc1", (f, d), "mlp.fc1", "mlp.fc1", _BOTH),
        ("mlp.linear_fc2", (d, f), "mlp.fc2", "mlp.fc2", _BOTH),
        ("mlp_bda.scale", (d,), "ls2", "lambda_2", _ONE),
    )
    for megatron, shape, remote, native, ends in modules:
        name = start + (native if is_native else remote)
        yield from _each(layer + megatron, shape, name, ends=ends, counts=counts)


def _vit_qkv_rows(
    config: VisionConfig, attention: str, start: str, is_native: bool
) -> Iterator[_Row]:
    d, heads, counts = config.hidden_size, config.num_heads, (config.num_layers,)
    kind = (SplitQKV if is_native else JoinedQKV)(
        num_heads=heads, num_query_groups=heads, head_dim=d // heads
    )
    own = start + ("attention." if is_native else "attn.")
    for end in _BOTH if config.qkv_bias else _BOTH[:1]:
        names = [f"{part}_proj" for part in "qkv"] if is_native else ["qkv"]
        shape = (3 * d,) if end == ".bias" else (3 * d, d)
        files = tuple(own + name + end for name in names)
        yield _Row(f"{attention}linear_qkv{end}", shape, files, kind, counts)
    for part in "qk" if config.qk_norm else "":
        name = f"{own}{part}_norm.weight"
        yield _Row(f"{attention}{part}_layernorm.weight", (d,), (name,), counts=counts)


def _connector_16x_rows(d: int, h: int) -> Iterator[_Row]:
    for megatron, shape, remote in (
        ("norm", (16 * d,), "0"),
        ("linear_1", (2 * h, 16 * d), "1"),
        ("linear_2", (2 * h, 2 * h), "4"),
        ("linear_3", (h, 2 * h), "7"),
    ):
        yield from _each("encoder.connector_16x." + megatron, shape, "mlp2." + remote)


def _vir_rows(d: int) -> Iterator[_Row]:
    # attn3, attn4, norm3 and norm4 are in every released checkpoint though no forward pass uses
    # them.
    pooling: tuple[tuple[str, tuple[int, ...], tuple[str, ...]], ...]
    pooling = (("query_token", (1, d), _ONE),)
    pooling += tuple(
        (f"{name}{n}{part}", shape, ends)
        for n in range(1, 5)
        for name, part, shape, ends in (
            ("attn", ".in_proj", (3 * d, d), ("_weight", "_bias")),
            ("attn", ".out_proj", (d, d), _BOTH),
            ("norm", "", (d,), _BOTH),
        )
    )
    gating: tuple[tuple[str, tuple[int, ...], tuple[str, ...]], ...]
    gating = tuple(
        (f"block{n}.{part}", shape, _BOTH)
        for n in range(1, 5)
        for part, shape in ((0, (4 * d, d)), (3, (d, 4 * d)), (5, (d,)))
    )
    gating += (("gate.0", (d,), _BOTH), ("gate.1", (2, d), _BOTH))
    for name, shape, ends in pooling:
        remote = "pooling_before_gating." + name
        yield from _each("encoder.vir.pooling." + name, shape, remote, ends=ends)
    for name, shape, ends in gating:
        yield from _each("encoder.vir.gating." + name, shape, "gating." + name, ends=ends)


def _language_rows(config: LanguageConfig, padded_vocab_size: int) -> Iterator[_Row]:
    h, heads, groups, width = (
        config.hidden_size,
        config.num_heads,
        config.num_query_groups,
        config.head_dim,
    )
    gpt, file = "language_model.gpt.", "language_model.model."
    layer, file_layer = gpt + "decoder.layers.{layer}.", file + "layers.{layer}."
    vocabulary = PaddedVocabulary(vocab_size=config.vocab_size, padded_vocab_size=padded_vocab_size)
    qkv = SplitQKV(num_heads=heads, num_query_groups=groups, head_dim=width)

    def row(
        megatron: str, shape: Shape, *names: str, kind: Mapping = DIRECT, experts: int = 0
    ) -> _Row:
        counts = (config.num_layers, experts) if experts else (config.num_layers,)
        files = tuple(file_layer + name for name in names)
        return _Row(layer + megatron, shape, files, kind, counts)

    matrix = (padded_vocab_size, h)
    embedding = gpt + "embedding.word_embeddings.weight"
    yield _Row(embedding, matrix, (file + "embed_tokens.weight",), vocabulary)
    # TransformerEngine's norms are part of the linear layer behind them, but for the one before the
    # experts.
    dense = config.num_experts is None
    mlp_norm = "mlp.linear_fc1.layer_norm_weight" if dense else "pre_mlp_layernorm.weight"
    names = tuple(f"self_attn.{part}_proj.weight" for part in "qkv")
    fused = ((heads + 2 * groups) * width, h)
    yield row("self_attention.linear_qkv.layer_norm_weight", (h,), "input_layernorm.weight")
    yield row("self_attention.linear_qkv.weight", fused, *names, kind=qkv)
    yield row("self_attention.q_layernorm.weight", (width,), "self_attn.q_norm.weight")
    yield row("self_attention.k_layernorm.weight", (width,), "self_attn.k_norm.weight")
    yield row("self_attention.linear_proj.weight", (h, heads * width), "self_attn.o_proj.weight")
    yield row(mlp_norm, (h,), "post_attention_layernorm.weight")
    mlp, file_mlp, f, experts = "mlp.", "mlp.", config.ffn_hidden_size, 0
    if config.num_experts is not None:
        assert config.moe_ffn_hidden_size is not None, "a model with experts has a width for them"
        mlp, file_mlp = "mlp.experts.experts.{expert}.", "mlp.experts.{expert}."
        f, experts = config.moe_ffn_hidden_size, config.num_experts
        yield row("mlp.router.weight", (experts, h), "mlp.gate.weight")
    names = (file_mlp + "gate_proj.weight", file_mlp + "up_proj.weight")
    yield row(mlp + "linear_fc1.weight", (2 * f, h), *names, kind=GatedMLP(), experts=experts)
    yield row(mlp + "linear_fc2.weight", (h, f), file_mlp + "down_proj.weight", experts=experts)
    yield _Row(gpt + "decoder.final_layernorm.weight", (h,), (file + "norm.weight",))
    yield _Row(gpt + "output_layer.weight", matrix, ("language_model.lm_head.weight",), vocabulary)
