"""Every real size in every layout: all file tensors and their shapes, against modules and published
figures.

Nothing here has memory: modules and file tensors are on the meta device. What is expected is
written down anew from the published configurations, formulas and key lists rather than taken from
the registry or the mapping table.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from megatron_vico.config.registry import get_model_config
from megatron_vico.convert.modules import canonical_state
from megatron_vico.convert.names.internvl import entries
from megatron_vico.convert.options import LAYOUTS, Layout
from tests.meta_models import build_without_memory

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Language:
    """A row of the published table of language models; the vocabulary is 151,936 and a head 128
    wide in all."""

    h: int
    num_layers: int
    num_heads: int
    num_groups: int
    ffn: int
    """Of an expert where there are experts."""
    num_experts: int = 0


@dataclass(frozen=True)
class Vision:
    """A column of the published table of towers."""

    d: int
    num_layers: int
    ffn: int
    is_6b: bool
    """RMSNorm, norms of queries and keys, no qkv bias."""


@dataclass(frozen=True)
class Counts:
    """Parameters of the released checkpoints; the router's include its four dead submodules."""

    vit: int
    mlp1: int
    language_model: int
    total: int
    mlp2: int
    router: int
    flash_total: int


SMALL, BIG = Vision(1024, 24, 4096, False), Vision(3200, 45, 12800, True)
VOCABULARY, HEAD_DIM = 151_936, 128
# Totals of 1B and 8B are those their pages publish, and that of 2B-Flash is the size of its file.
SIZES = {
    "internvl3_5-1b": (SMALL, Language(1024, 28, 16, 8, 3072)),
    "internvl3_5-2b": (SMALL, Language(2048, 28, 16, 8, 6144)),
    "internvl3_5-4b": (SMALL, Language(2560, 36, 32, 8, 9728)),
    "internvl3_5-8b": (SMALL, Language(4096, 36, 32, 8, 12288)),
    "internvl3_5-14b": (SMALL, Language(5120, 40, 40, 8, 17408)),
    "internvl3_5-38b": (BIG, Language(5120, 64, 64, 8, 25600)),
    "internvl3_5-30b-a3b": (SMALL, Language(2048, 48, 32, 4, 768, 128)),
    "internvl3_5-241b-a28b": (BIG, Language(4096, 94, 64, 4, 1536, 128)),
}
VIT_300M, VIT_6B, ROUTER_300M, ROUTER_6B = 304_012_288, 5_536_496_000, 50_390_018, 491_702_402
# fmt: off
COUNTS = {
    "internvl3_5-1b": Counts(
        VIT_300M, 5_253_120, 751_632_384, 1_060_897_792, 39_883_776,
        ROUTER_300M, 1_151_171_586),
    "internvl3_5-2b": Counts(
        VIT_300M, 12_595_200, 2_031_739_904, 2_348_347_392, 92_317_696,
        ROUTER_300M, 2_491_055_106),
    "internvl3_5-4b": Counts(
        VIT_300M, 17_052_672, 4_411_424_256, 4_732_489_216, 123_253_248,
        ROUTER_300M, 4_906_132_482),
    "internvl3_5-8b": Counts(
        VIT_300M, 33_570_816, 8_190_735_360, 8_528_318_464, 234_934_272,
        ROUTER_300M, 8_813_642_754),
    "internvl3_5-14b": Counts(
        VIT_300M, 47_204_352, 14_768_307_200, 15_119_523_840, 325_116_928,
        ROUTER_300M, 15_495_030_786),
    "internvl3_5-38b": Counts(
        VIT_6B, 91_786_240, 32_762_123_264, 38_390_405_504, 681_702_400,
        ROUTER_6B, 39_563_810_306),
    "internvl3_5-30b-a3b": Counts(
        VIT_300M, 12_595_200, 30_532_122_624, 30_848_730_112, 92_317_696,
        ROUTER_300M, 30_991_437_826),
    "internvl3_5-241b-a28b": Counts(
        VIT_6B, 69_239_808, 235_093_634_560, 240_699_370_368, 520_216_576,
        ROUTER_6B, 241_711_289_346),
}
# fmt: on


def linear(name: str, out: int, in_: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, in_)
    yield f"{name}.bias", (out,)


def norm(name: str, width: int, *, has_bias: bool = True) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    if has_bias:
        yield f"{name}.bias", (width,)


def remote_vision(tower: Vision) -> Iterator[tuple[str, Shape]]:
    d, start = tower.d, "vision_model.embeddings."
    yield start + "class_embedding", (1, 1, d)
    yield start + "patch_embedding.weight", (d, 3, 14, 14)
    yield start + "patch_embedding.bias", (d,)
    yield start + "position_embedding", (1, 1025, d)
    for n in range(tower.num_layers):
        layer = f"vision_model.encoder.layers.{n}."
        yield layer + "attn.qkv.weight", (3 * d, d)
        if tower.is_6b:
            yield layer + "attn.q_norm.weight", (d,)
            yield layer + "attn.k_norm.weight", (d,)
        else:
            yield layer + "attn.qkv.bias", (3 * d,)
        yield from linear(layer + "attn.proj", d, d)
        yield from linear(layer + "mlp.fc1", tower.ffn, d)
        yield from linear(layer + "mlp.fc2", d, tower.ffn)
        for name in ("norm1", "norm2"):
            yield from norm(layer + name, d, has_bias=not tower.is_6b)
        yield layer + "ls1", (d,)
        yield layer + "ls2", (d,)


def native_vision(tower: Vision) -> Iterator[tuple[str, Shape]]:
    d, start = tower.d, "vision_tower.embeddings."
    yield start + "cls_token", (1, 1, d)
    yield start + "patch_embeddings.projection.weight", (d, 3, 14, 14)
    yield start + "patch_embeddings.projection.bias", (d,)
    yield start + "position_embeddings", (1, 1025, d)
    for n in range(tower.num_layers):
        layer = f"vision_tower.encoder.layer.{n}."
        for part in "qkv":
            yield f"{layer}attention.{part}_proj.weight", (d, d)
            if not tower.is_6b:
                yield f"{layer}attention.{part}_proj.bias", (d,)
        if tower.is_6b:
            yield layer + "attention.q_norm.weight", (d,)
            yield layer + "attention.k_norm.weight", (d,)
        yield from linear(layer + "attention.projection_layer", d, d)
        yield from linear(layer + "mlp.fc1", tower.ffn, d)
        yield from linear(layer + "mlp.fc2", d, tower.ffn)
        for name in ("layernorm_before", "layernorm_after"):
            yield from norm(layer + name, d, has_bias=not tower.is_6b)
        yield layer + "lambda_1", (d,)
        yield layer + "lambda_2", (d,)


def connector_4x(d: int, h: int, names: tuple[str, str, str]) -> Iterator[tuple[str, Shape]]:
    yield from norm(names[0], 4 * d)
    yield from linear(names[1], h, 4 * d)
    yield from linear(names[2], h, h)


def flash(d: int, h: int) -> Iterator[tuple[str, Shape]]:
    yield from norm("mlp2.0", 16 * d)
    yield from linear("mlp2.1", 2 * h, 16 * d)
    yield from linear("mlp2.4", 2 * h, 2 * h)
    yield from linear("mlp2.7", h, 2 * h)
    yield "pooling_before_gating.query_token", (1, d)
    for n in (1, 2, 3, 4):
        attention = f"pooling_before_gating.attn{n}."
        yield attention + "in_proj_weight", (3 * d, d)
        yield attention + "in_proj_bias", (3 * d,)
        yield from linear(attention + "out_proj", d, d)
        yield from norm(f"pooling_before_gating.norm{n}", d)
        yield from linear(f"gating.block{n}.0", 4 * d, d)
        yield from linear(f"gating.block{n}.3", d, 4 * d)
        yield from norm(f"gating.block{n}.5", d)
    yield from norm("gating.gate.0", d)
    yield from linear("gating.gate.1", 2, d)


def language_model(model: Language) -> Iterator[tuple[str, Shape]]:
    h, start = model.h, "language_model.model."
    yield start + "embed_tokens.weight", (VOCABULARY, h)
    for n in range(model.num_layers):
        layer = f"{start}layers.{n}."
        yield layer + "input_layernorm.weight", (h,)
        yield layer + "post_attention_layernorm.weight", (h,)
        yield layer + "self_attn.q_proj.weight", (model.num_heads * HEAD_DIM, h)
        yield layer + "self_attn.k_proj.weight", (model.num_groups * HEAD_DIM, h)
        yield layer + "self_attn.v_proj.weight", (model.num_groups * HEAD_DIM, h)
        yield layer + "self_attn.o_proj.weight", (h, model.num_heads * HEAD_DIM)
        yield layer + "self_attn.q_norm.weight", (HEAD_DIM,)
        yield layer + "self_attn.k_norm.weight", (HEAD_DIM,)
        if model.num_experts:
            yield layer + "mlp.gate.weight", (model.num_experts, h)
        mlps = [f"mlp.experts.{expert}." for expert in range(model.num_experts)] or ["mlp."]
        for mlp in mlps:
            yield layer + mlp + "gate_proj.weight", (model.ffn, h)
            yield layer + mlp + "up_proj.weight", (model.ffn, h)
            yield layer + mlp + "down_proj.weight", (h, model.ffn)
    yield start + "norm.weight", (h,)
    yield "language_model.lm_head.weight", (VOCABULARY, h)


def published(name: str, layout: Layout) -> dict[str, Shape]:
    """File tensors of a released checkpoint."""
    tower, model = SIZES[name]
    if layout == "hf":
        names = tuple(
            f"multi_modal_projector.{part}" for part in ("layer_norm", "linear_1", "linear_2")
        )
        files = [*native_vision(tower), *connector_4x(tower.d, model.h, names)]  # type: ignore[arg-type]
    else:
        files = [
            *remote_vision(tower),
            *connector_4x(tower.d, model.h, ("mlp1.0", "mlp1.1", "mlp1.3")),
        ]
    files += language_model(model)
    files += flash(tower.d, model.h) if layout == "flash" else []
    assert len(dict(files)) == len(files)
    return dict(files)


@cache
def modules_of(name: str) -> dict[str, Tensor]:
    """Meta tensors of a size's modules under the table's names; one size after the other, so
    building is done once."""
    encoder, language = build_without_memory(get_model_config(name))
    return canonical_state({"encoder": encoder, "language_model": language})


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SIZES)
def test_keys_and_shapes_of_both_directions(
    name: str, layout: Layout, single_process_groups: None
) -> None:
    modules, expected = modules_of(name), published(name, layout)
    rows = entries(get_model_config(name), layout=layout)
    assert rows.keys() == modules.keys()
    files: dict[str, Shape] = {}
    for key, row in rows.items():
        if not row.files:
            assert key.startswith(("encoder.connector_16x.", "encoder.vir."))
            continue
        exported = row.kind.to_hf(modules[key])
        files |= {file: tuple(part.shape) for file, part in zip(row.files, exported, strict=True)}
        imported = row.kind.to_megatron(
            [torch.empty(expected[file], device="meta") for file in row.files]
        )
        assert imported.shape == modules[key].shape, key
    assert files == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts(name: str, single_process_groups: None) -> None:
    counts = COUNTS[name]
    files = {file: math.prod(shape) for file, shape in published(name, "flash").items()}

    def total(*prefixes: str) -> int:
        return sum(number for file, number in files.items() if file.startswith(prefixes))

    assert (
        Counts(
            vit=total("vision_model."),
            mlp1=total("mlp1."),
            language_model=total("language_model."),
            total=sum(math.prod(shape) for shape in published(name, "internvl").values()),
            mlp2=total("mlp2."),
            router=total("pooling_before_gating.", "gating."),
            flash_total=sum(files.values()),
        )
        == counts
    )
    assert sum(math.prod(shape) for shape in published(name, "hf").values()) == counts.total
    # No vocabulary is padded at one tensor-parallel rank, so the modules' parameters are as many.
    assert sum(tensor.numel() for tensor in modules_of(name).values()) == counts.flash_total
