"""The architecture in an InternVL config.json: one table of fields, to read and to write.

Two forms: `remote` is that of the remote-code layouts (model_type internvl_chat, with or without
Flash), `native` is transformers' own (model_type internvl). What changes no tensor's shape and is
computed in one way only is a fact of the family: written as it is, and refused where it differs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from megatron_vico.config.config_values import not_of_kind, unsound
from megatron_vico.config.registry import (
    MODELS,
    LanguageConfig,
    ModelConfig,
    VisionConfig,
    get_model_config,
    named,
)
from megatron_vico.errors import CheckpointError, ConfigError
from megatron_vico.files import read_json

Json = dict[str, Any]
Form = Literal["remote", "native"]

CHECKPOINT = "checkpoint"
"""Value of --model-size: the size of the checkpoint that is loaded."""

_IMAGE_TOKEN = "<IMG_CONTEXT>"
_OWN = ("image_token_id", "vir_num_heads")
_ROUTER_HEADS = 16  # of the released models


# What the forms call a thing.
_LANGUAGE_PART: dict[Form, str] = {"remote": "llm_config", "native": "text_config"}
_IMAGE_TOKEN_ID: dict[Form, str] = {"remote": "img_context_token_id", "native": "image_token_id"}
_SIDES = ("image_size", "patch_size")
_SHARED_VISION = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "norm_type": "norm_type",
    "norm_eps": "layer_norm_eps",
}
# Field of VisionConfig -> field of vision_config.
_VISION: dict[Form, dict[str, str]] = {
    "remote": _SHARED_VISION
    | {
        "qkv_bias": "qkv_bias",
        "qk_norm": "qk_normalization",
        "layer_scale_init": "initializer_factor",
    },
    "native": _SHARED_VISION
    | {
        "qkv_bias": "attention_bias",
        "qk_norm": "use_qk_norm",
        "layer_scale_init": "layer_scale_init_value",
    },
}
_FACTS: dict[Form, Json] = {
    "remote": {
        "downsample_ratio": 0.5,
        "min_dynamic_patch": 1,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
    },
    "native": {
        "downsample_ratio": 0.5,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    },
}
_SHARED_VISION_FACTS: Json = {"hidden_act": "gelu", "num_channels": 3}
_VISION_FACTS: dict[Form, Json] = {
    "remote": _SHARED_VISION_FACTS,
    "native": _SHARED_VISION_FACTS
    | {
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
    },
}
# Field of LanguageConfig -> field of llm_config and text_config alike.
_LANGUAGE = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
}
_EXPERTS = {
    "num_experts": "num_experts",
    "moe_top_k": "num_experts_per_tok",
    "moe_ffn_hidden_size": "moe_intermediate_size",
}
_LANGUAGE_FACTS: Json = {
    "attention_bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
_EXPERT_FACTS: Json = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
# They change neither weights nor outputs: a preset is recognised whatever they are, and a model of
# its own size need not state them.
_NOT_COMPARED = frozenset({"max_position_embeddings", "layer_scale_init"})


def architecture_json(model: ModelConfig, form: Form) -> Json:
    """What a config.json says of a model's size and family; the rest is not of this file."""
    vision, language = model.vision, model.language
    vision_config = {name: getattr(vision, ours) for ours, name in _VISION[form].items()}
    if form == "native":
        vision_config |= {side: [vision_config[side]] * 2 for side in ("image_size", "patch_size")}
    dense = language.num_experts is None
    named_fields = _LANGUAGE if dense else _LANGUAGE | _EXPERTS
    return {
        **_FACTS[form],
        _IMAGE_TOKEN_ID[form]: model.image_token_id,
        "vision_config": vision_config | _VISION_FACTS[form],
        _LANGUAGE_PART[form]: {
            **{name: getattr(language, ours) for ours, name in named_fields.items()},
            **_LANGUAGE_FACTS,
            **({} if dense else _EXPERT_FACTS),
            "model_type": "qwen3" if dense else "qwen3_moe",
            "rope_scaling": None,
        },
    }


def model_named(size: str) -> ModelConfig:
    """The model that --model-size names: a preset, or a config.json, or a folder with one.

    Raises:
        ConfigError: if it is neither.
        CheckpointError: if the file describes no model of this family.
    """
    path = Path(size)
    if size not in MODELS and path.exists():
        path = path / "config.json" if path.is_dir() else path
        return read_model(read_json(path), path=str(path))
    try:
        return get_model_config(size)
    except ConfigError as error:
        raise ConfigError(f"{error}; or give the path of a config.json") from error


def read_model(config: Json, *, path: str, expected: str | None = None) -> ModelConfig:
    """The model that a config.json describes.

    A field that it does not state is left to the check of tensor shapes where the others say which
    preset it is.

    Args:
        config: its contents.
        path: of the file, for errors; a tokenizer beside it is asked for the image token's id if
            the file does not state it.
        expected: what --model-size says, see `model_named`; unset or `checkpoint`, any will do.

    Returns:
        A preset where the file is equal to one.

    Raises:
        CheckpointError: naming the field, if the modules cannot compute such a model; if it is not
            the expected one, or fields are missing that tell which it is.
    """
    form: Form = "native" if config.get("model_type") == "internvl" else "remote"
    _refuse(_not_tables(config, form), path)
    _refuse(_refused(config, form), path)
    stated = _stated_fields(config, form)
    if "model.image_token_id" not in stated:
        stated |= _token_of_tokenizer(Path(path).parent)
    _refuse(not_of_kind(stated), path)
    if expected not in (None, CHECKPOINT):
        try:
            model = model_named(expected)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}") from error
        differing = _differences(stated, model)
        if differing:
            raise CheckpointError(
                f"{path}: the checkpoint is {_known_as(stated)}, expected {model.name}:"
                f" {'; '.join(differing)}."
            )
        return model
    fitting = [name for name, model in MODELS.items() if not _differences(stated, model)]
    if len(fitting) > 1:
        raise CheckpointError(
            f"{path} fits several sizes ({', '.join(fitting)}); say which with --model-size."
        )
    return MODELS[fitting[0]] if fitting else _built(stated, path)


def differences(found: ModelConfig, expected: ModelConfig) -> list[str]:
    """How one model differs from another, field by field."""
    stated: Json = {f"model.{name}": getattr(found, name) for name in _OWN}
    for part in ("vision", "language"):
        section = getattr(found, part)
        stated |= {f"{part}.{item.name}": getattr(section, item.name) for item in fields(section)}
    return _differences(stated, expected)


def _stated_fields(config: Json, form: Form) -> Json:
    """`part.field` of a ModelConfig -> what config.json says, for the fields it states."""
    heads = config.get("vir_num_heads")
    if heads == _ROUTER_HEADS and not config.get("flash_mode"):
        heads = None  # transformers writes the class's default also where there is no router
    stated: Json = {
        "model.image_token_id": config.get(_IMAGE_TOKEN_ID[form]),
        "model.vir_num_heads": heads,
    }
    vision = config.get("vision_config") or {}
    for ours, name in _VISION[form].items():
        value = vision.get(name)
        # Tiles are square; transformers writes both sides.
        if name in _SIDES and isinstance(value, list) and len(value) == 2:
            value = value[0]
        stated[f"vision.{ours}"] = value
    language = dict(config.get(_LANGUAGE_PART[form]) or {})
    rope = language.get("rope_parameters") or {}
    language.setdefault("rope_theta", rope.get("rope_theta"))
    language.setdefault("num_experts", language.get("num_local_experts"))
    has_experts = language.get("model_type") != "qwen3"
    for ours, name in (_LANGUAGE | (_EXPERTS if has_experts else {})).items():
        stated[f"language.{ours}"] = language.get(name)
    stated = {name: value for name, value in stated.items() if value is not None}
    return stated if has_experts else stated | {"language.num_experts": None}


def _token_of_tokenizer(folder: Path) -> Json:
    """The image token's id by the tokenizer in a folder; nothing where none says it.

    The released remote code asks the tokenizer, so that its config.json has no such field.
    """
    file = folder / "added_tokens.json"
    if file.exists():
        found = read_json(file).get(_IMAGE_TOKEN)
        return {} if found is None else {"model.image_token_id": found}
    file = folder / "tokenizer_config.json"
    if file.exists():
        for number, token in (read_json(file).get("added_tokens_decoder") or {}).items():
            if isinstance(token, dict) and token.get("content") == _IMAGE_TOKEN:
                return {"model.image_token_id": int(number)}
    return {}


def _refused(config: Json, form: Form) -> Iterator[str]:
    """What a config.json says that no module here computes; most of it no tensor would tell."""
    part = _LANGUAGE_PART[form]
    vision, language = config.get("vision_config") or {}, config.get(part) or {}
    has_experts = language.get("model_type") == "qwen3_moe"
    language_facts = _LANGUAGE_FACTS | (_EXPERT_FACTS if has_experts else {})
    for prefix, section, facts in (
        ("", config, _FACTS[form]),
        ("vision_config.", vision, _VISION_FACTS[form]),
        (f"{part}.", language, language_facts),
    ):
        for name, expected in facts.items():
            if section.get(name) not in (None, expected):
                yield f"{prefix}{name} is {section[name]!r}, expected {expected!r}"
    for side in _SIDES:
        value = vision.get(side)
        if isinstance(value, list) and value != value[:1] * 2:
            yield f"vision_config.{side} is {value}, expected two equal sides"
    forced = config.get("force_image_size")
    if form == "remote" and forced not in (None, vision.get("image_size", forced)):
        yield f"force_image_size is {forced}, expected image_size {vision['image_size']} of the ViT"
    if language.get("model_type") not in (None, "qwen3", "qwen3_moe"):
        yield f"{part}.model_type is {language['model_type']!r}, expected 'qwen3' or 'qwen3_moe'"
    rope = language.get("rope_parameters") or {}
    scaling = language.get("rope_scaling") or rope
    rope_type = scaling.get("rope_type", scaling.get("type"))
    # Dynamic scaling begins beyond the position limit, where nothing is trained.
    if rope_type not in (None, "default", "dynamic"):
        yield f"{part}: rope_type is {rope_type!r}, expected 'default'"
    rotated = rope.get("partial_rotary_factor", 1.0)
    if rotated != 1.0:
        yield f"{part}: partial_rotary_factor is {rotated}, expected 1.0 or none"
    layers = language.get("layer_types") or []
    other = [each for each in layers if each != "full_attention"]
    if other:
        yield f"{part}.layer_types has {other[0]!s:.80}, expected full_attention only"


def _differences(stated: Json, model: ModelConfig) -> list[str]:
    differing = []
    for name, found in stated.items():
        part, field = name.split(".")
        expected = getattr(model if part == "model" else getattr(model, part), field)
        # Beside experts no layer uses the dense width.
        unused = name == "language.ffn_hidden_size" and model.language.num_experts is not None
        if found != expected and field not in _NOT_COMPARED and not unused:
            differing.append(f"{name} is {found!r}, {model.name} has {expected!r}")
    return differing


def _known_as(stated: Json) -> str:
    fitting = [name for name, model in MODELS.items() if not _differences(stated, model)]
    return " or ".join(fitting) or "of no preset's size"


def _built(stated: Json, path: str) -> ModelConfig:
    """A model that is no preset, from what its config.json says."""
    parts: dict[str, Json] = {"model": {}, "vision": {}, "language": {}}
    for name, value in stated.items():
        part, field = name.split(".")
        parts[part][field] = value
    vision, language, own = parts["vision"], parts["language"], parts["model"]
    has_experts = language.get("num_experts") is not None
    if has_experts:  # no layer uses the dense width then
        language.setdefault("ffn_hidden_size", language.get("moe_ffn_hidden_size"))
    wanted = {
        "vision": _VISION["remote"].keys() - _NOT_COMPARED,
        "language": (_LANGUAGE | (_EXPERTS if has_experts else {})).keys() - _NOT_COMPARED,
    }
    missing = [f"{part}.{name}" for part in wanted for name in wanted[part] - parts[part].keys()]
    if missing:
        nearest_size = min(MODELS.values(), key=lambda each: len(_differences(stated, each)))
        raise CheckpointError(
            f"{path} fits no preset (the nearest is {nearest_size.name}, but:"
            f" {'; '.join(_differences(stated, nearest_size))}), and does not state"
            f" {', '.join(sorted(missing))}, which a model of its own size needs."
        )
    width = vision["hidden_size"]
    # Released Flash models have 16 built in; another width gets the most of them that fit.
    own.setdefault("vir_num_heads", max(n for n in range(1, _ROUTER_HEADS + 1) if width % n == 0))
    model = ModelConfig(
        name="custom", vision=VisionConfig(**vision), language=LanguageConfig(**language), **own
    )
    _refuse(unsound(model), path)
    return named(model)


def _refuse(problems: Iterable[str], path: str) -> None:
    found = "; ".join(problems)
    if found:
        raise CheckpointError(f"{path} describes a model that cannot be computed here: {found}.")


def _not_tables(config: Json, form: Form) -> Iterator[str]:
    """Parts, and switches, that are no JSON value of their kind."""
    part = _LANGUAGE_PART[form]
    language = config.get(part)
    inner = language if isinstance(language, dict) else {}
    for name, value, kind, expected in (
        ("flash_mode", config.get("flash_mode"), bool, "true or false"),
        ("dynamic_image_size", config.get("dynamic_image_size"), bool, "true or false"),
        ("vision_config", config.get("vision_config"), dict, "a JSON object"),
        (part, language, dict, "a JSON object"),
        (f"{part}.rope_parameters", inner.get("rope_parameters"), dict, "a JSON object"),
        (f"{part}.rope_scaling", inner.get("rope_scaling"), dict, "a JSON object"),
        (f"{part}.layer_types", inner.get("layer_types"), list, "a list"),
    ):
        if not isinstance(value, kind | None):
            yield f"{name} is {value!r:.80}, expected {expected}"
