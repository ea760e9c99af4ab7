"""What a model is, its parameter counts, and the released sizes as presets.

A model of any other size is described by its config.json (config/config_json.py). No torch here, so
that recipes and layouts can be checked on a machine without it.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from megatron_vico.errors import ConfigError, nearest
from megatron_vico.files import record_of

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Pixels are normalised by these in every size."""

MAX_TILES = 256
"""Of an image, as a flag, a config or a sample may say: choosing a grid takes the cube of it."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """An InternViT tower."""

    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_hidden_size: int
    image_size: int = 448
    patch_size: int = 14
    norm_type: Literal["layer_norm", "rms_norm"]
    qkv_bias: bool
    qk_norm: bool
    """RMSNorm of queries and keys over all channels, before they are split into heads."""
    norm_eps: float = 1e-6
    layer_scale_init: float = 0.1

    @property
    def num_patches(self) -> int:
        """Patches of one tile, the class token not counted."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """A Qwen3 or, with `num_experts`, Qwen3-MoE model; InternVL3.5 never ties its embeddings."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_query_groups: int
    head_dim: int = 128
    ffn_hidden_size: int
    vocab_size: int = 151936
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    max_position_embeddings: int = 40960
    num_experts: int | None = None
    moe_top_k: int = 8
    moe_ffn_hidden_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameters of each module; `vir` has the four dead submodules of released checkpoints."""

    vit: int
    connector_4x: int
    language_model: int
    connector_16x: int
    vir: int

    @property
    def total(self) -> int:
        """Parameters of the whole Flash model."""
        return self.vit + self.connector_4x + self.language_model + self.connector_16x + self.vir


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """An InternVL3.5-Flash of one size."""

    name: str
    """A preset's, or made of the fields: models of one name are equal."""

    vision: VisionConfig
    language: LanguageConfig
    vir_num_heads: int = 16
    image_token_id: int = 151671
    """Id of <IMG_CONTEXT>; one is replaced by each visual token."""

    @property
    def visual_tokens_per_tile(self) -> int:
        """Visual tokens of a kept tile (256 at the real sizes)."""
        return self.vision.num_patches // 4

    @property
    def compressed_tokens_per_tile(self) -> int:
        """Visual tokens of a compressed tile (64 at the real sizes)."""
        return self.vision.num_patches // 16

    def parameter_counts(self) -> ParameterCounts:
        """Parameters of each module, by formula: nothing is allocated."""
        d, h = self.vision.hidden_size, self.language.hidden_size
        pooling = d + 4 * (4 * d * d + 4 * d) + 4 * 2 * d
        gating = 4 * (8 * d * d + 7 * d) + 2 * d + 2 * d + 2
        return ParameterCounts(
            vit=_vit_parameters(self.vision),
            connector_4x=8 * d + (4 * d * h + h) + (h * h + h),
            language_model=_language_parameters(self.language),
            connector_16x=32 * d + (32 * d * h + 2 * h) + (4 * h * h + 2 * h) + (2 * h * h + h),
            vir=pooling + gating,
        )


def _vit_parameters(config: VisionConfig) -> int:
    d, f = config.hidden_size, config.ffn_hidden_size
    embeddings = d + (1 + config.num_patches) * d + (3 * config.patch_size**2 * d + d)
    attention = (
        3 * d * d + d * d + d + (3 * d if config.qkv_bias else 0) + (2 * d if config.qk_norm else 0)
    )
    mlp = 2 * d * f + f + d
    norms = 2 * (2 * d if config.norm_type == "layer_norm" else d)
    return embeddings + config.num_layers * (attention + mlp + norms + 2 * d)


def _language_parameters(config: LanguageConfig) -> int:
    h, width = config.hidden_size, config.head_dim
    attention = h * width * (2 * config.num_heads + 2 * config.num_query_groups) + 2 * width
    if config.num_experts is None:
        mlp = 3 * h * config.ffn_hidden_size
    else:
        assert config.moe_ffn_hidden_size is not None
        mlp = config.num_experts * (h + 3 * h * config.moe_ffn_hidden_size)
    return 2 * config.vocab_size * h + h + config.num_layers * (attention + mlp + 2 * h)


_INTERN_VIT_300M = VisionConfig(
    hidden_size=1024,
    num_layers=24,
    num_heads=16,
    ffn_hidden_size=4096,
    norm_type="layer_norm",
    qkv_bias=True,
    qk_norm=False,
)
_INTERN_VIT_6B = VisionConfig(
    hidden_size=3200,
    num_layers=45,
    num_heads=25,
    ffn_hidden_size=12800,
    norm_type="rms_norm",
    qkv_bias=False,
    qk_norm=True,
)


def _qwen3(hidden: int, layers: int, heads: int, ffn: int) -> LanguageConfig:
    return LanguageConfig(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_query_groups=8,
        ffn_hidden_size=ffn,
    )


def _qwen3_moe(hidden: int, layers: int, heads: int, moe_ffn: int) -> LanguageConfig:
    return LanguageConfig(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_query_groups=4,
        ffn_hidden_size=3 * hidden,  # in the released config, but no layer uses it
        num_experts=128,
        moe_ffn_hidden_size=moe_ffn,
    )


_TOY = ModelConfig(
    name="toy",
    # Full-strength layer scale: three layers trained from scratch never recover from 0.1.
    vision=VisionConfig(
        hidden_size=96,
        num_layers=3,
        num_heads=4,
        ffn_hidden_size=384,
        image_size=32,
        patch_size=8,
        norm_type="layer_norm",
        qkv_bias=True,
        qk_norm=False,
        layer_scale_init=1.0,
    ),
    language=LanguageConfig(
        hidden_size=128,
        num_layers=3,
        num_heads=4,
        num_query_groups=4,
        head_dim=32,
        ffn_hidden_size=256,
        vocab_size=512,
        rope_theta=1e4,
    ),
    vir_num_heads=4,
    image_token_id=5,
)
# The 6B kind of tower: RMSNorm, norm of queries and keys, no qkv bias, an odd number of heads. Its
# language model has grouped queries and a head_dim that is not hidden_size / num_heads, as half of
# the real sizes do; and, as that of toy-moe, four layers for four pipeline stages.
_TOY_6B = ModelConfig(
    name="toy-6b",
    vision=VisionConfig(
        hidden_size=40,
        num_layers=2,
        num_heads=5,
        ffn_hidden_size=96,
        image_size=32,
        patch_size=8,
        norm_type="rms_norm",
        qkv_bias=False,
        qk_norm=True,
    ),
    language=LanguageConfig(
        hidden_size=48,
        num_layers=4,
        num_heads=4,
        num_query_groups=2,
        head_dim=16,
        ffn_hidden_size=96,
        vocab_size=512,
        rope_theta=1e4,
    ),
    vir_num_heads=4,
    image_token_id=5,
)
_TOY_MOE = replace(
    _TOY_6B,
    name="toy-moe",
    vision=VisionConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        ffn_hidden_size=64,
        image_size=32,
        patch_size=8,
        norm_type="layer_norm",
        qkv_bias=True,
        qk_norm=False,
    ),
    language=replace(
        _TOY_6B.language,
        ffn_hidden_size=144,
        num_experts=4,
        moe_top_k=2,
        moe_ffn_hidden_size=32,
    ),
)

_RELEASED = {
    "internvl3_5-1b": (_INTERN_VIT_300M, _qwen3(1024, 28, 16, 3072)),
    "internvl3_5-2b": (_INTERN_VIT_300M, _qwen3(2048, 28, 16, 6144)),
    "internvl3_5-4b": (_INTERN_VIT_300M, _qwen3(2560, 36, 32, 9728)),
    "internvl3_5-8b": (_INTERN_VIT_300M, _qwen3(4096, 36, 32, 12288)),
    "internvl3_5-14b": (_INTERN_VIT_300M, _qwen3(5120, 40, 40, 17408)),
    "internvl3_5-38b": (_INTERN_VIT_6B, _qwen3(5120, 64, 64, 25600)),
    "internvl3_5-30b-a3b": (_INTERN_VIT_300M, _qwen3_moe(2048, 48, 32, 768)),
    "internvl3_5-241b-a28b": (_INTERN_VIT_6B, _qwen3_moe(4096, 94, 64, 1536)),
}

MODELS: dict[str, ModelConfig] = {
    name: ModelConfig(name=name, vision=vision, language=language)
    for name, (vision, language) in _RELEASED.items()
} | {toy.name: toy for toy in (_TOY, _TOY_6B, _TOY_MOE)}
"""The presets, by name."""


def get_model_config(name: str) -> ModelConfig:
    """The preset of that name; ConfigError with the nearest name if there is none."""
    if name not in MODELS:
        raise ConfigError(
            f"unknown model size {name!r}{nearest(name, MODELS)} (known: {', '.join(MODELS)})"
        )
    return MODELS[name]


def named(model: ModelConfig) -> ModelConfig:
    """A model under the name of the preset that it equals, or one made of its fields."""
    for preset in MODELS.values():
        if replace(model, name=preset.name) == preset:
            return preset
    fields = {key: value for key, value in asdict(model).items() if key != "name"}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    language = model.language
    return replace(model, name=f"custom-{language.num_layers}x{language.hidden_size}-{digest[:6]}")


def model_from_fields(fields: dict[str, Any]) -> ModelConfig:
    """The model that `dataclasses.asdict` made `fields` of; TypeError where they do not fit."""
    parts = {"vision": VisionConfig, "language": LanguageConfig}
    return record_of(
        ModelConfig,
        {**fields, **{name: record_of(kind, fields[name]) for name, kind in parts.items()}},
    )
