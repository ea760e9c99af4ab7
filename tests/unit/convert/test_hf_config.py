"""The JSON files beside the weights: what they must say in each layout."""

from typing import Any

import pytest

from megatron_vico.config.registry import MODELS, get_model_config
from megatron_vico.convert.huggingface.config import (
    ExportOptions,
    generation_json,
    layout_of,
    model_json,
    preprocessor_json,
)
from megatron_vico.convert.options import LAYOUTS, Layout

OPTIONS = ExportOptions(flash_relative_threshold=0.1, flash_absolute_threshold=0.4, eos_token_id=7)


def config_of(name: str, layout: Layout) -> dict[str, Any]:
    return model_json(get_model_config(name), layout=layout, dtype="bfloat16", options=OPTIONS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_layout_is_found_again(name: str, layout: Layout) -> None:
    assert layout_of(config_of(name, layout), path="config.json") == layout


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


def test_flash_models_that_are_switched_off_are_still_flash() -> None:
    config = config_of("toy", "flash") | {"flash_mode": False}
    assert layout_of(config, path="config.json") == "internvl"
    assert (
        layout_of(config, path="config.json", tensors=("mlp1.0.weight", "mlp2.0.weight")) == "flash"
    )
