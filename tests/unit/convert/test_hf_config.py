"""config.json of each layout: what it must say, and that the size is found from it again."""

from typing import Any

import pytest

from megatron_vico.config.registry import MODELS, get_model_config
from megatron_vico.convert.huggingface.config import (
    ExportOptions,
    generation_json,
    layout_of,
    model_json,
    model_of,
    preprocessor_json,
)
from megatron_vico.convert.names.internvl import LAYOUTS, Layout
from megatron_vico.errors import CheckpointError

OPTIONS = ExportOptions(flash_relative_threshold=0.1, flash_absolute_threshold=0.4, eos_token_id=7)


def config_of(name: str, layout: Layout) -> dict[str, Any]:
    return model_json(get_model_config(name), layout=layout, dtype="bfloat16", options=OPTIONS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_layout_and_size_are_found_again(name: str, layout: Layout) -> None:
    config = config_of(name, layout)
    assert layout_of(config, path="config.json") == layout
    assert model_of(config, layout=layout, path="config.json").name == name
    assert model_of(config, layout=layout, path="config.json", expected=name).name == name


def test_flash_fields() -> None:
    config = config_of("internvl3_5-38b", "flash")
    stated = {
        "architectures": ["InternVLChatModel"],
        "flash_mode": True,
        "flash_relative_threshold": 0.1,
        "flash_absolute_threshold": 0.4,
        "force_image_size": 448,
        "downsample_ratio": 0.5,
        "select_layer": -1,
        "ps_version": "v2",
        "template": "internvl2_5",
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    assert stated.items() <= config.items()
    vision = {
        "hidden_size": 3200,
        "num_hidden_layers": 45,
        "num_attention_heads": 25,
        "intermediate_size": 12800,
    }
    kind = {
        "qkv_bias": False,
        "qk_normalization": True,
        "norm_type": "rms_norm",
        "layer_norm_eps": 1e-6,
    }
    assert (vision | kind).items() <= config["vision_config"].items()
    language = {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "head_dim": 128,
    }
    rest = {
        "num_key_value_heads": 8,
        "vocab_size": 151936,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 7,
    }
    assert (language | rest).items() <= config["llm_config"].items()
    assert not config["llm_config"]["tie_word_embeddings"]


def test_only_flash_says_flash() -> None:
    for layout in ("internvl", "hf"):
        assert not [field for field in config_of("toy", layout) if field.startswith("flash")]  # type: ignore[arg-type]


def test_experts() -> None:
    language = config_of("internvl3_5-30b-a3b", "hf")["text_config"]
    stated = {
        "model_type": "qwen3_moe",
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    }
    assert stated.items() <= language.items()
    assert language["norm_topk_prob"]


def test_native_layout_unties_the_embeddings() -> None:
    config = config_of("internvl3_5-1b", "hf")
    assert config["tie_word_embeddings"] is False  # the class's default is True
    assert config["image_token_id"] == 151671  # the class's default is another token
    assert config["image_seq_length"] == 256


def test_small_files() -> None:
    assert generation_json(OPTIONS) == {"do_sample": False, "eos_token_id": 7, "pad_token_id": None}
    model = get_model_config("internvl3_5-8b")
    remote = preprocessor_json(model, layout="flash", options=OPTIONS)
    assert remote["image_mean"] == [0.485, 0.456, 0.406]
    assert remote["size"] == 448
    native = preprocessor_json(model, layout="hf", options=OPTIONS)
    assert native["size"] == {"height": 448, "width": 448}
    assert native["max_patches"] == 12


def test_names_of_newer_transformers() -> None:
    config = config_of("internvl3_5-30b-a3b", "hf")
    text = config["text_config"]
    text["num_local_experts"] = text.pop("num_experts")
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    assert model_of(config, layout="hf", path="config.json").name == "internvl3_5-30b-a3b"
    text["rope_parameters"]["rope_theta"] = 5e6
    with pytest.raises(CheckpointError, match=r"rope_theta is 5000000\.0"):
        model_of(config, layout="hf", path="config.json")


def test_unstated_fields_are_left_to_the_tensors() -> None:
    config = config_of("internvl3_5-38b", "internvl")
    config["vision_config"] = {"hidden_size": 3200}
    assert model_of(config, layout="internvl", path="config.json").name == "internvl3_5-38b"


def test_another_size_names_both() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"is internvl3_5-8b, expected internvl3_5-4b: language\.hidden_size is",
    ):
        model_of(
            config_of("internvl3_5-8b", "flash"),
            layout="flash",
            path="config.json",
            expected="internvl3_5-4b",
        )


def test_unknown_size_names_the_nearest_and_the_difference() -> None:
    config = config_of("internvl3_5-8b", "internvl")
    config["llm_config"]["num_hidden_layers"] = 35
    with pytest.raises(
        CheckpointError, match=r"nearest is internvl3_5-8b, but: language\.num_layers is 35"
    ):
        model_of(config, layout="internvl", path="config.json")


def test_too_little_to_tell() -> None:
    with pytest.raises(CheckpointError, match="fits several sizes"):
        model_of({"vision_config": {"hidden_size": 1024}}, layout="internvl", path="config.json")
    with pytest.raises(CheckpointError, match=r"unknown model size 'internvl-8b'; did you mean"):
        model_of({}, layout="internvl", path="config.json", expected="internvl-8b")


def test_tied_embeddings_are_refused() -> None:
    config = config_of("internvl3_5-1b", "internvl")
    config["llm_config"]["tie_word_embeddings"] = True
    with pytest.raises(CheckpointError, match="tie_word_embeddings is True"):
        model_of(config, layout="internvl", path="config.json")


@pytest.mark.parametrize(
    ("layout", "part", "field", "value", "message"),
    [
        ("internvl", None, "ps_version", "v1", "ps_version is 'v1', internvl3_5-1b has 'v2'"),
        ("flash", None, "select_layer", -2, "select_layer is -2"),
        ("hf", None, "vision_feature_layer", -2, "select_layer is -2"),
        ("hf", None, "downsample_ratio", 0.25, r"downsample_ratio is 0\.25"),
        (
            "internvl",
            "llm_config",
            "rope_scaling",
            {"type": "yarn", "factor": 4.0},
            "rope_type is 'yarn'",
        ),
        (
            "hf",
            "text_config",
            "rope_parameters",
            {"rope_type": "yarn", "rope_theta": 1e6},
            "rope_type is 'yarn'",
        ),
    ],
)
def test_what_no_tensor_would_tell(
    layout: Layout, part: str | None, field: str, value: object, message: str
) -> None:
    """Models whose tensors fit, but which compute something else."""
    config = config_of("internvl3_5-1b", layout)
    (config if part is None else config[part])[field] = value
    with pytest.raises(CheckpointError, match=message):
        model_of(config, layout=layout, path="config.json")


def test_dynamic_scaling_changes_nothing_up_to_the_position_limit() -> None:
    config = config_of("internvl3_5-1b", "internvl")
    config["llm_config"]["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    assert model_of(config, layout="internvl", path="config.json").name == "internvl3_5-1b"


def test_layouts_that_contradict_themselves() -> None:
    with pytest.raises(CheckpointError, match="has no Flash form"):
        layout_of(config_of("toy", "hf") | {"flash_mode": True}, path="config.json")
    with pytest.raises(CheckpointError, match="'llava'"):
        layout_of({"model_type": "llava"}, path="config.json")


def test_flash_models_that_are_switched_off_are_still_flash() -> None:
    config = config_of("toy", "flash") | {"flash_mode": False}
    assert layout_of(config, path="config.json") == "internvl"
    assert (
        layout_of(config, path="config.json", tensors=("mlp1.0.weight", "mlp2.0.weight")) == "flash"
    )
