"""The JSON files beside an InternVL3.5 checkpoint's weights: written for a model, and read to find
which it is."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from megatron_vico.config.registry import (
    MODELS,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
    get_model_config,
)
from megatron_vico.convert.names.internvl import Layout
from megatron_vico.convert.remote_code_files import AUTO_MAP
from megatron_vico.errors import CheckpointError, ConfigError
from megatron_vico.vico.routing import FLASH_ABSOLUTE_THRESHOLD, FLASH_RELATIVE_THRESHOLD

Json = dict[str, Any]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What an exported checkpoint says beyond its weights."""

    flash_relative_threshold: float = FLASH_RELATIVE_THRESHOLD
    """Quantile of the conversation's tiles a tile must exceed to be compressed; the released value
    is not published."""

    flash_absolute_threshold: float = FLASH_ABSOLUTE_THRESHOLD
    """Least probability of "compress"; 0.5 is the paper's rule."""

    flash_decision_rule: Literal["paper", "flash"] = "flash"
    """What the exported model code does: paper, p > 0.5; flash, both thresholds, as released models
    and servers do."""

    max_dynamic_patch: int = 12
    """Most tiles of one image, thumbnail not counted."""

    use_thumbnail: bool = True
    """Whether the whole image is one more tile."""

    template: str = "internvl2_5"
    """Conversation template of the remote code."""

    eos_token_id: int | None = None
    """Where generation stops; unset, this and the next are the tokenizer's."""

    pad_token_id: int | None = None
    """What fills up shorter samples of a batch."""


def model_json(model: ModelConfig, *, layout: Layout, dtype: str, options: ExportOptions) -> Json:
    """config.json.

    Args:
        model: the size.
        layout: whose field names to use.
        dtype: torch's name of the weights' format, such as bfloat16.
        options: see `ExportOptions`.

    Returns:
        The file's contents.
    """
    language = _language_json(model.language, dtype=dtype, options=options)
    if layout == "hf":
        return {
            "architectures": ["InternVLForConditionalGeneration"],
            "model_type": "internvl",
            "torch_dtype": dtype,
            "downsample_ratio": 0.5,
            "image_seq_length": model.visual_tokens_per_tile,
            "image_token_id": model.image_token_id,
            "projector_hidden_act": "gelu",
            # transformers' default is True and would tie the output layer to the embedding.
            "tie_word_embeddings": False,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "text_config": language,
            "vision_config": _native_vision_json(model.vision),
        }
    config: Json = {
        "architectures": ["InternVLChatModel"],
        "auto_map": dict(AUTO_MAP),
        "model_type": "internvl_chat",
        "torch_dtype": dtype,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": model.vision.image_size,
        # Not a released field: the released code asks the tokenizer.
        "img_context_token_id": model.image_token_id,
        "max_dynamic_patch": options.max_dynamic_patch,
        "min_dynamic_patch": 1,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": options.template,
        "tie_word_embeddings": False,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": options.use_thumbnail,
        "llm_config": language,
        "vision_config": _remote_vision_json(model.vision),
    }
    if layout == "flash":
        config["flash_mode"] = True
        config["flash_relative_threshold"] = options.flash_relative_threshold
        config["flash_absolute_threshold"] = options.flash_absolute_threshold
        # Not released fields: the released code knows the flash rule only, and has 16 heads built
        # in, which toys cannot have.
        config["flash_decision_rule"] = options.flash_decision_rule
        config["vir_num_heads"] = model.vir_num_heads
    return config


def generation_json(options: ExportOptions) -> Json:
    """generation_config.json: greedy, and where to stop."""
    return {
        "do_sample": False,
        "eos_token_id": options.eos_token_id,
        "pad_token_id": options.pad_token_id,
    }


def preprocessor_json(model: ModelConfig, *, layout: Layout, options: ExportOptions) -> Json:
    """preprocessor_config.json: transformers' own image processor for `hf`, the remote code's CLIP
    one otherwise."""
    size = model.vision.image_size
    normalisation = {
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }
    if layout == "hf":
        return {
            "image_processor_type": "GotOcr2ImageProcessor",
            "processor_class": "InternVLProcessor",
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": options.max_dynamic_patch,
            "do_convert_rgb": True,
            "do_rescale": True,
            "do_resize": True,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"height": size, "width": size},
            **normalisation,
        }
    return {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "crop_size": size,
        "do_center_crop": True,
        "do_resize": True,
        "resample": 3,
        "size": size,
        **normalisation,
    }


def options_of(config: Json) -> ExportOptions:
    """What a checkpoint says beyond its weights, so that it can be said again in another layout.

    Args:
        config: contents of its config.json, in any layout.

    Returns:
        The options; defaults for what its layout does not say.
    """
    names = (
        *("flash_relative_threshold", "flash_absolute_threshold", "flash_decision_rule"),
        *("max_dynamic_patch", "use_thumbnail", "template"),
    )
    said = {name: config[name] for name in names if config.get(name) is not None}
    language = config.get("llm_config") or config.get("text_config") or {}
    said |= {
        name: language[name]
        for name in ("eos_token_id", "pad_token_id")
        if isinstance(language.get(name), int)
    }
    return ExportOptions(**said)


def layout_of(config: Json, *, path: str, tensors: Collection[str] = ()) -> Layout:
    """The layout of a checkpoint.

    Args:
        config: contents of its config.json.
        path: of the file, for the error.
        tensors: names of its tensors; with them, a Flash model whose flash_mode was switched off is
            known as one.

    Returns:
        The layout; whether all tensors agree is checked against the table when they are read.

    Raises:
        CheckpointError: if it is no InternVL checkpoint, or announces two layouts at once.
    """
    model_type, flash = (
        config.get("model_type"),
        bool(config.get("flash_mode")) or "mlp2.0.weight" in tensors,
    )
    native = any(name.startswith("vision_tower.") for name in tensors)
    if native and model_type != "internvl":
        raise CheckpointError(
            f"{path}: model_type {model_type!r} is that of the remote-code layouts (internvl,"
            " flash), but the tensors have the names of transformers' own layout (hf), such as"
            " vision_tower.*; use the config.json that came with these weights."
        )
    if model_type == "internvl" and flash:
        raise CheckpointError(
            f"{path}: model_type 'internvl' (transformers' own layout) has no Flash form, but this"
            " claims to be one; remove flash_mode, or use the remote-code Flash checkpoint"
            " (model_type 'internvl_chat')."
        )
    if model_type == "internvl":
        return "hf"
    if model_type == "internvl_chat" or config.get("architectures") == ["InternVLChatModel"]:
        return "flash" if flash else "internvl"
    raise CheckpointError(
        f"{path}: model_type is {model_type!r}, expected 'internvl' or 'internvl_chat'; this is no"
        " InternVL checkpoint."
    )


def model_of(
    config: Json, *, layout: Layout, path: str, expected: str | None = None
) -> ModelConfig:
    """The size that a config.json describes; fields it does not state are left to the check of
    tensor shapes.

    Args:
        config: its contents.
        layout: from `layout_of`.
        path: of the file, for errors.
        expected: name of the size it should be; unset, any known one.

    Returns:
        The size, from the registry.

    Raises:
        CheckpointError: if it is not the expected size, none of the known ones, or could be
            several.
    """
    stated = _stated_fields(config, layout)
    if expected is not None:
        try:
            model = get_model_config(expected)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from error
        differing = _differences(stated, model)
        if differing:
            found = [each.name for each in MODELS.values() if not _differences(stated, each)]
            raise CheckpointError(
                f"{path}: the checkpoint is {' or '.join(found) or 'of no known size'}, expected"
                f" {expected}: {'; '.join(differing)}."
            )
        return model
    found = [each.name for each in MODELS.values() if not _differences(stated, each)]
    if len(found) == 1:
        return MODELS[found[0]]
    if found:
        raise CheckpointError(
            f"{path} fits several sizes ({', '.join(found)}); say which with --model-size."
        )
    nearest_size = min(MODELS.values(), key=lambda each: len(_differences(stated, each)))
    raise CheckpointError(
        f"{path} describes no known size; the nearest is {nearest_size.name}, but: "
        f"{'; '.join(_differences(stated, nearest_size))}."
    )


def _language_json(config: LanguageConfig, *, dtype: str, options: ExportOptions) -> Json:
    dense = config.num_experts is None
    fields: Json = {
        "architectures": ["Qwen3ForCausalLM" if dense else "Qwen3MoeForCausalLM"],
        "model_type": "qwen3" if dense else "qwen3_moe",
        "torch_dtype": dtype,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": options.eos_token_id,
        "pad_token_id": options.pad_token_id,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.ffn_hidden_size,
        "max_position_embeddings": config.max_position_embeddings,
        "max_window_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_query_groups,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }
    if not dense:
        fields |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": config.moe_ffn_hidden_size,
            "norm_topk_prob": True,
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.moe_top_k,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        }
    return fields


def _vision_json(config: VisionConfig) -> Json:
    return {
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.ffn_hidden_size,
        "layer_norm_eps": config.norm_eps,
        "norm_type": config.norm_type,
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "num_hidden_layers": config.num_layers,
    }


def _native_vision_json(config: VisionConfig) -> Json:
    return _vision_json(config) | {
        "architectures": ["InternVisionModel"],
        "model_type": "internvl_vision",
        "attention_bias": config.qkv_bias,
        "hidden_dropout_prob": 0.0,
        "image_size": [config.image_size, config.image_size],
        "layer_scale_init_value": config.layer_scale_init,
        "patch_size": [config.patch_size, config.patch_size],
        "projection_dropout": 0.0,
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
        "use_qk_norm": config.qk_norm,
    }


def _remote_vision_json(config: VisionConfig) -> Json:
    return _vision_json(config) | {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",  # of both towers, in all releases
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "image_size": config.image_size,
        "initializer_factor": config.layer_scale_init,
        "patch_size": config.patch_size,
        "qk_normalization": config.qk_norm,
        "qkv_bias": config.qkv_bias,
        "use_flash_attn": True,
    }


# Ours, then the field of vision_config in the remote-code and in transformers' layout.
_VISION_FIELDS = (
    ("hidden_size", "hidden_size", "hidden_size"),
    ("num_layers", "num_hidden_layers", "num_hidden_layers"),
    ("num_heads", "num_attention_heads", "num_attention_heads"),
    ("ffn_hidden_size", "intermediate_size", "intermediate_size"),
    ("image_size", "image_size", "image_size"),
    ("patch_size", "patch_size", "patch_size"),
    ("norm_type", "norm_type", "norm_type"),
    ("norm_eps", "layer_norm_eps", "layer_norm_eps"),
    ("qkv_bias", "qkv_bias", "attention_bias"),
    ("qk_norm", "qk_normalization", "use_qk_norm"),
)
# Ours, then the names that transformers' releases have used, in llm_config and text_config alike.
# Left out: the position limit, which changes neither weights nor outputs, and the dense width
# beside experts, which nothing uses.
_LANGUAGE_FIELDS = (
    ("hidden_size", "hidden_size"),
    ("num_layers", "num_hidden_layers"),
    ("num_heads", "num_attention_heads"),
    ("num_query_groups", "num_key_value_heads"),
    ("head_dim", "head_dim"),
    ("vocab_size", "vocab_size"),
    ("rope_theta", "rope_theta"),
    ("rope_type", "rope_type"),
    ("norm_eps", "rms_norm_eps"),
    ("num_experts", "num_experts", "num_local_experts"),
    ("moe_top_k", "num_experts_per_tok"),
    ("moe_ffn_hidden_size", "moe_intermediate_size"),
    ("model_type", "model_type"),
    ("norm_topk_prob", "norm_topk_prob"),
    ("tie_word_embeddings", "tie_word_embeddings"),
)


def _stated_fields(config: Json, layout: Layout) -> Json:
    """Our names of fields -> what config.json says, for those it states."""
    whole = {
        "ps_version": config.get("ps_version"),
        "downsample_ratio": config.get("downsample_ratio"),
    }
    whole["select_layer"] = config.get("vision_feature_layer" if layout == "hf" else "select_layer")
    stated: Json = {f"model.{name}": value for name, value in whole.items() if value is not None}
    vision = config.get("vision_config") or {}
    for ours, remote, native in _VISION_FIELDS:
        value = vision.get(native if layout == "hf" else remote)
        if value is not None:
            # Towers are square; transformers writes both sides.
            stated[f"vision.{ours}"] = value[0] if isinstance(value, list) else value
    language = dict(config.get("text_config" if layout == "hf" else "llm_config") or {})
    rope = language.get("rope_parameters") or {}
    language.setdefault("rope_theta", rope.get("rope_theta"))
    scaling = language.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type"))
    # Dynamic scaling begins beyond the position limit, which is left out too.
    language["rope_type"] = None if kind == "dynamic" else kind
    for ours, *names in _LANGUAGE_FIELDS:
        values = [language[name] for name in names if language.get(name) is not None]
        if values:
            stated[f"language.{ours}"] = values[0]
    if language.get("model_type") == "qwen3":
        stated["language.ffn_hidden_size"] = language.get("intermediate_size")
    return stated


def _differences(stated: Json, model: ModelConfig) -> list[str]:
    dense = model.language.num_experts is None
    # Facts of the family rather than fields of a size. Most change no tensor's shape: nothing else
    # would tell.
    family = {
        "model.ps_version": "v2",
        "model.downsample_ratio": 0.5,
        "model.select_layer": -1,
        "language.rope_type": "default",
        "language.model_type": "qwen3" if dense else "qwen3_moe",
        "language.norm_topk_prob": True,
        "language.tie_word_embeddings": False,
    }
    differing = []
    for name, found in stated.items():
        part, field = name.split(".")
        expected = family[name] if name in family else getattr(getattr(model, part), field)
        if found != expected:
            differing.append(f"{name} is {found!r}, {model.name} has {expected!r}")
    return differing
