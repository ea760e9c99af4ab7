"""The architecture in config.json: every size is found again, and what no module computes is
refused by its field."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from megatron_vico.config.config_json import differences, model_named, read_model
from megatron_vico.config.registry import MODELS, ModelConfig, get_model_config, named
from megatron_vico.convert.huggingface.config import ExportOptions, model_json, said_of_use
from megatron_vico.convert.options import LAYOUTS, Layout
from megatron_vico.errors import CheckpointError, ConfigError


def config_of(model: str | ModelConfig, layout: Layout) -> dict[str, Any]:
    model = get_model_config(model) if isinstance(model, str) else model
    return model_json(model, layout=layout, dtype="bfloat16", options=ExportOptions())


def changed(base: str, *, own: Any = None, vision: Any = None, language: Any = None) -> ModelConfig:
    """A preset with other numbers."""
    model = get_model_config(base)
    return replace(
        model,
        **own or {},
        vision=replace(model.vision, **vision or {}),
        language=replace(model.language, **language or {}),
    )


ODD = {
    "added tokens": changed(
        "internvl3_5-1b", own={"image_token_id": 151680}, language={"vocab_size": 151951}
    ),
    "fewer layers": changed(
        "internvl3_5-8b", language={"num_layers": 30}, vision={"num_layers": 20}
    ),
    "another width": changed(
        "internvl3_5-2b",
        vision={"hidden_size": 768, "num_heads": 12, "ffn_hidden_size": 3072, "image_size": 224},
        language={"hidden_size": 1536, "num_heads": 24, "ffn_hidden_size": 5000, "head_dim": 64},
    ),
    "fewer experts": changed(
        "internvl3_5-30b-a3b",
        language={"num_experts": 60, "moe_top_k": 4, "moe_ffn_hidden_size": 512},
    ),
    "other frequencies": changed("toy-6b", language={"rope_theta": 5e6, "norm_eps": 1e-5}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_presets_are_found_again(name: str, layout: Layout) -> None:
    config = config_of(name, layout)
    assert read_model(config, path="config.json") is MODELS[name]
    assert read_model(config, path="config.json", expected=name) is MODELS[name]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("odd", ODD)
def test_any_size_is_read_and_written_again(odd: str, layout: Layout, tmp_path) -> None:
    config = config_of(ODD[odd], layout)
    found = read_model(config, path="config.json")
    # The router's heads are in Flash files only, the towers' initial scale in none.
    assert not differences(replace(found, vir_num_heads=ODD[odd].vir_num_heads), ODD[odd])
    assert found.name.startswith(
        f"custom-{found.language.num_layers}x{found.language.hidden_size}-"
    )
    assert named(found) == found
    assert config_of(found, layout) == config_of(replace(found, name="any"), layout) == config
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_named(str(tmp_path)) == model_named(str(tmp_path / "config.json")) == found
    assert read_model(config, path="config.json", expected=str(tmp_path)) == found


def test_a_name_stands_for_one_model() -> None:
    names = {named(replace(model, name="any")).name for model in (*ODD.values(), *MODELS.values())}
    assert len(names) == len(ODD) + len(MODELS)
    assert names > set(MODELS)


def test_names_of_newer_transformers() -> None:
    config = config_of("internvl3_5-30b-a3b", "hf")
    text = config["text_config"]
    text["num_local_experts"] = text.pop("num_experts")
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    assert read_model(config, path="config.json").name == "internvl3_5-30b-a3b"
    text["rope_parameters"]["rope_theta"] = 5e6
    assert read_model(config, path="config.json").language.rope_theta == 5e6


def test_unstated_fields_of_a_preset_are_left_to_the_tensors() -> None:
    config = config_of("internvl3_5-38b", "internvl")
    config["vision_config"] = {"hidden_size": 3200}
    assert read_model(config, path="config.json").name == "internvl3_5-38b"


def test_too_little_to_tell() -> None:
    with pytest.raises(CheckpointError, match="fits several sizes"):
        read_model({"vision_config": {"hidden_size": 1024}}, path="config.json")
    config = config_of(ODD["fewer layers"], "internvl")
    del config["llm_config"]["rms_norm_eps"], config["vision_config"]["num_attention_heads"]
    with pytest.raises(
        CheckpointError,
        match=r"nearest is internvl3_5-8b, but: .*language\.num_layers is 30.* and does not state"
        r" language\.norm_eps, vision\.num_heads",
    ):
        read_model(config, path="config.json")


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_the_image_token_of_the_tokenizer_counts_where_config_does_not_say(file, tmp_path) -> None:
    """As in released remote-code folders."""
    config = config_of("internvl3_5-1b", "internvl")
    del config["img_context_token_id"]
    path = str(tmp_path / "config.json")
    for token in (151671, 151667):
        contents: dict[str, Any] = {"<IMG_CONTEXT>": token, "<img>": 7}
        if file == "tokenizer_config.json":
            contents = {"added_tokens_decoder": {str(token): {"content": "<IMG_CONTEXT>"}}}
        (tmp_path / file).write_text(json.dumps(contents))
        found = read_model(config, path=path)
        assert found.image_token_id == token
        assert (found.name == "internvl3_5-1b") == (token == 151671)


def test_another_size_than_the_expected_names_both() -> None:
    config = config_of("internvl3_5-8b", "flash")
    for expected, message in (
        (
            "internvl3_5-4b",
            r"is internvl3_5-8b, expected internvl3_5-4b: language\.hidden_size is 4096",
        ),
        ("internvl-8b", r"unknown model size 'internvl-8b'; did you mean 'internvl3_5-8b'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_model(config, path="config.json", expected=expected)
    assert read_model(config, path="config.json", expected="checkpoint").name == "internvl3_5-8b"
    with pytest.raises(ConfigError, match="or give the path of a config"):
        model_named("internvl3_5")


YARN = {"type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("layout", "part", "field", "value", "message"),
    [
        ("internvl", "", "ps_version", "v1", "ps_version is 'v1', expected 'v2'"),
        ("flash", "", "select_layer", -2, "select_layer is -2, expected -1"),
        ("hf", "", "vision_feature_layer", -2, "vision_feature_layer is -2, expected -1"),
        ("hf", "", "vision_feature_select_strategy", "full", "'full', expected 'default'"),
        ("hf", "", "downsample_ratio", 0.25, r"downsample_ratio is 0\.25, expected 0\.5"),
        ("hf", "", "projector_hidden_act", "relu", "projector_hidden_act is 'relu'"),
        ("flash", "", "force_image_size", 336, "is 336, expected image_size 448"),
        ("flash", "", "vir_num_heads", 12, "1024, expected a multiple of 12"),
        ("hf", "", "image_token_id", 151936, "is 151936, expected less than vocab_size 151936"),
        ("internvl", "vision", "hidden_act", "silu", "hidden_act is 'silu', expected 'gelu'"),
        ("internvl", "vision", "num_channels", 4, "num_channels is 4, expected 3"),
        ("internvl", "vision", "num_attention_heads", 15, "a multiple of 15"),
        ("internvl", "vision", "norm_type", "batch_norm", "norm_type is 'batch_norm'"),
        ("hf", "vision", "image_size", [448, 224], "expected two equal sides"),
        ("hf", "vision", "image_size", [420, 420], "420, expected a multiple of 56"),
        ("hf", "vision", "use_mean_pooling", False, "use_mean_pooling is False"),
        ("hf", "vision", "use_mask_token", True, "use_mask_token is True"),
        ("hf", "vision", "use_absolute_position_embeddings", False, "is False, expected True"),
        ("internvl", "language", "rope_scaling", YARN, "rope_type is 'yarn'"),
        ("internvl", "language", "rope_scaling", {"type": "linear"}, "rope_type is 'linear'"),
        ("hf", "language", "rope_parameters", {"rope_type": "yarn"}, "rope_type is 'yarn'"),
        ("hf", "language", "rope_parameters", {"partial_rotary_factor": 0.5}, "0.5, expected 1.0"),
        ("hf", "language", "rope_theta", 1e4 + 0.5, "expected a multiple of 1"),
        ("hf", "language", "num_attention_heads", 0, "num_heads is 0, expected a whole number"),
        ("hf", "language", "head_dim", 127, "127, expected a multiple of 2"),
        ("hf", "language", "num_key_value_heads", 3, "16, expected a multiple of 3"),
        ("internvl", "language", "tie_word_embeddings", True, "tie_word_embeddings is True"),
        ("internvl", "language", "attention_bias", True, "attention_bias is True"),
        ("internvl", "language", "hidden_act", "gelu", "hidden_act is 'gelu', expected 'silu'"),
        ("internvl", "language", "model_type", "llama", "model_type is 'llama', expected 'qwen3'"),
        ("hf", "language", "use_sliding_window", True, "use_sliding_window is True"),
        ("hf", "language", "layer_types", ["sliding_attention"], "has sliding_attention"),
        ("hf", "experts", "norm_topk_prob", False, "norm_topk_prob is False"),
        ("hf", "experts", "decoder_sparse_step", 2, "decoder_sparse_step is 2"),
        ("hf", "experts", "mlp_only_layers", [0], r"mlp_only_layers is \[0\]"),
        ("hf", "experts", "num_experts_per_tok", 129, "129, expected at most num_experts 128"),
    ],
)
def test_what_no_module_computes_is_refused_by_field(
    layout: Layout, part: str, field: str, value: object, message: str
) -> None:
    """Most of it no tensor would tell: they fit, and the model computes something else."""
    config = config_of("internvl3_5-30b-a3b" if part == "experts" else "internvl3_5-1b", layout)
    language = "text_config" if layout == "hf" else "llm_config"
    names = {"vision": "vision_config", "language": language, "experts": language}
    (config[names[part]] if part else config)[field] = value
    with pytest.raises(CheckpointError, match=message):
        read_model(config, path="config.json")


def test_dynamic_scaling_changes_nothing_up_to_the_position_limit() -> None:
    config = config_of("internvl3_5-1b", "internvl")
    config["llm_config"]["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    assert read_model(config, path="config.json").name == "internvl3_5-1b"


NOT_READ = set(
    "architectures auto_map AutoConfig AutoModel AutoModelForCausalLM attention_dropout dropout"
    " drop_path_rate hidden_dropout_prob image_seq_length initializer_range max_window_layers"
    " model_type output_router_logits projection_dropout router_aux_loss_coef sliding_window"
    " tie_word_embeddings torch_dtype use_backbone_lora use_cache use_flash_attn"
    " use_llm_lora".split()
)
WRONG: dict[str, tuple[object, set[str]]] = {
    # A value, and the fields that may have it.
    "text": ("x", {"template"}),
    "list": ([], {"eos_token_id"}),
    "nested": ([[1], {}], set()),
    "negative": (-7, set()),
    "huge": (10**12, {"eos_token_id", "pad_token_id"}),
    "huger": (10**400, {"eos_token_id", "pad_token_id"}),
    "infinite": (math.inf, set()),
    "NaN": (math.nan, set()),
    "object": ({"a": {"b": 1}}, {"vision_config", "llm_config", "text_config", "rope_scaling"}),
    "half": (1.5, {"initializer_factor", "layer_scale_init_value"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrong", WRONG)
def test_every_field_is_of_its_kind_or_refused(layout: Layout, wrong: str) -> None:
    """No other error, nothing that overflows or hangs later, and no line without end."""
    value, may = WRONG[wrong]
    config, passed, refused = config_of("toy", layout), set(), [0]
    parts = {"": config} | {name: part for name, part in config.items() if isinstance(part, dict)}
    for part, fields in parts.items():
        for name in fields:
            odd = {**fields, name: value}
            odd = {**config, part: odd} if part else odd
            try:
                read_model(odd, path="config.json")
                said_of_use(odd, path="config.json")
            except CheckpointError as error:
                refused.append(len(str(error)))
            else:
                passed.add(name)
    assert max(refused) < 1000
    assert passed - NOT_READ == may & set().union(*parts.values())
