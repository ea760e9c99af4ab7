"""JSON files beside an InternVL3.5 checkpoint's weights; the architecture is config_json.py's."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_vico.config.config_json import Form, Json, architecture_json
from megatron_vico.config.registry import IMAGENET_MEAN, IMAGENET_STD, MAX_TILES, ModelConfig
from megatron_vico.convert.options import Layout
from megatron_vico.convert.remote_code_files import AUTO_MAP
from megatron_vico.errors import CheckpointError
from megatron_vico.vico.routing import FLASH_ABSOLUTE_THRESHOLD, FLASH_RELATIVE_THRESHOLD


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

    tile_tags: Literal["none", "numbered"] = "none"
    """Text before each tile."""

    router_granularity: Literal["tile", "image"] = "tile"
    """What ViR was trained to decide on."""

    template: str = "internvl2_5"
    """Conversation template of the remote code."""

    eos_token_id: int | list[int] | None = None
    """Where generation stops; unset, this and the next are the tokenizer's."""

    pad_token_id: int | None = None
    """What fills up shorter samples of a batch."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """`eos_token_id` as a list, empty where it is unset."""
        ids = self.eos_token_id
        return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def model_json(
    model: ModelConfig,
    *,
    layout: Layout,
    dtype: str,
    options: ExportOptions,
    untrained: Sequence[str] = (),
) -> Json:
    """config.json of a model, whose weights have a layout and torch's dtype such as bfloat16.

    `untrained`: modules of the layout that hold what they were drawn with.
    """
    form: Form = "native" if layout == "hf" else "remote"
    config = architecture_json(model, form) | {
        "torch_dtype": dtype,
        # transformers' default is True and would tie the output layer to the embedding.
        "tie_word_embeddings": False,
    }
    # Not released fields: what training may do that InternVL's own does not.
    config |= {name: value for name in _OWN if (value := getattr(options, name)) != _OWN[name]}
    config["vision_config"] |= _VISION
    part = "text_config" if layout == "hf" else "llm_config"
    config[part] |= _language_json(model, dtype=dtype, options=options)
    if layout == "hf":
        config["vision_config"] |= _NATIVE_VISION
        # transformers reads the tiles from preprocessor_config.json and always adds a thumbnail.
        config |= {} if options.use_thumbnail else {"use_thumbnail": False}
        return config | {
            "architectures": ["InternVLForConditionalGeneration"],
            "model_type": "internvl",
            "image_seq_length": model.visual_tokens_per_tile,
        }
    config["vision_config"] |= _REMOTE_VISION
    config |= {
        "architectures": ["InternVLChatModel"],
        "auto_map": dict(AUTO_MAP),
        "model_type": "internvl_chat",
        "dynamic_image_size": True,
        "force_image_size": model.vision.image_size,
        "max_dynamic_patch": options.max_dynamic_patch,
        "template": options.template,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": options.use_thumbnail,
    }
    if layout == "flash":
        config |= {
            # Off: servers and the model code compress nothing, but a plan of the caller's can.
            "flash_mode": not untrained,
            "flash_relative_threshold": options.flash_relative_threshold,
            "flash_absolute_threshold": options.flash_absolute_threshold,
            # Not released fields: the released code knows the flash rule only, and has 16 heads
            # built in, which toys cannot have.
            "flash_decision_rule": options.flash_decision_rule,
            "vir_num_heads": model.vir_num_heads,
            **({"untrained_modules": list(untrained)} if untrained else {}),
        }
    return config


def generation_json(options: ExportOptions) -> Json:
    """generation_config.json: greedy, and where to stop."""
    return {
        "do_sample": False,
        "eos_token_id": options.eos_token_id,
        "pad_token_id": options.pad_token_id,
    }


def preprocessor_json(model: ModelConfig, *, layout: Layout, options: ExportOptions) -> Json:
    """preprocessor_config.json: of transformers' own image processor, or the remote code's CLIP."""
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


def processor_json(model: ModelConfig) -> Json:
    """processor_config.json, of transformers' own processor."""
    return {
        "processor_class": "InternVLProcessor",
        "image_seq_length": model.visual_tokens_per_tile,
    }


def said_of_use(config: Json, *, path: str) -> dict[str, Any]:
    """What a config.json of any layout says of `ExportOptions`, by name, to be said again.

    CheckpointError, naming the field, if a value is not of its kind.
    """
    said = {name: config[name] for name in _KINDS if config.get(name) is not None}
    if config.get("dynamic_image_size") is False:
        said["max_dynamic_patch"] = 1
    sections = (config.get("llm_config") or {}, config.get("text_config") or {}, config)
    for name in ("eos_token_id", "pad_token_id"):
        stated = [section.get(name) for section in sections if isinstance(section, dict)]
        found = next((value for value in stated if value is not None), None)
        said |= {} if found is None else {name: found}
    check_said(said, path=path)
    return said


def check_said(said: dict[str, Any], *, path: str) -> None:
    """CheckpointError if a value is not what `ExportOptions` can take under its name."""
    for name, value in said.items():
        expected, fits = (_KINDS | _IDS)[name]
        if not fits(value):
            raise CheckpointError(f"{path}: {name} is {value!r}, expected {expected}.")


def layout_of(config: Json, *, path: str, tensors: Collection[str] = ()) -> Layout:
    """The layout of a checkpoint; whether all its tensors agree is checked when they are read.

    With the names of its tensors, a Flash model whose flash_mode was switched off is known as one.
    CheckpointError if it is no InternVL checkpoint, or announces two layouts at once.
    """
    model_type = config.get("model_type")
    flash = bool(config.get("flash_mode")) or "mlp2.0.weight" in tensors
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


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# Name -> what a value must be, in words and as a check.
_KINDS = {
    "flash_relative_threshold": ("a number from 0 to 1", _is_share),
    "flash_absolute_threshold": ("a number from 0 to 1", _is_share),
    "flash_decision_rule": ("'paper' or 'flash'", ("paper", "flash").__contains__),
    "max_dynamic_patch": (
        f"1 to {MAX_TILES}",
        lambda value: _is_id(value) and 1 <= value <= MAX_TILES,
    ),
    "use_thumbnail": ("true or false", lambda value: isinstance(value, bool)),
    "tile_tags": ("'none' or 'numbered'", ("none", "numbered").__contains__),
    "router_granularity": ("'tile' or 'image'", ("tile", "image").__contains__),
    "template": ("a name", lambda value: isinstance(value, str)),
}
_IDS = {
    "eos_token_id": (
        "a token's id or a list of them",
        lambda value: _is_id(value) or (isinstance(value, list) and all(map(_is_id, value))),
    ),
    "pad_token_id": ("a token's id", _is_id),
}
_OWN = {"tile_tags": "none", "router_granularity": "tile"}

# What is the same in every config.json and read from none.
_VISION: Json = {
    "architectures": ["InternVisionModel"],
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
}
_NATIVE_VISION: Json = {
    "model_type": "internvl_vision",
    "hidden_dropout_prob": 0.0,
    "projection_dropout": 0.0,
}
_REMOTE_VISION: Json = {
    "model_type": "intern_vit_6b",  # of both towers, in all releases
    "drop_path_rate": 0.0,
    "dropout": 0.0,
    "use_flash_attn": True,
}


def _language_json(model: ModelConfig, *, dtype: str, options: ExportOptions) -> Json:
    dense = model.language.num_experts is None
    fields: Json = {
        "architectures": ["Qwen3ForCausalLM" if dense else "Qwen3MoeForCausalLM"],
        "torch_dtype": dtype,
        "attention_dropout": 0.0,
        "eos_token_id": options.eos_token_id,
        "pad_token_id": options.pad_token_id,
        "initializer_range": 0.02,
        "max_window_layers": model.language.num_layers,
        "sliding_window": None,
        "use_cache": True,
    }
    if not dense:
        fields |= {"output_router_logits": False, "router_aux_loss_coef": 0.001}
    return fields
