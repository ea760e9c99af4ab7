"""Models that are no preset: from transformers to Megatron's form, a step of training, and out
again, to be loaded by transformers itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from megatron_vico import files
from megatron_vico.checkpoint.run_folder import read_metadata, resolve_model
from megatron_vico.config.config_json import differences
from megatron_vico.config.registry import ModelConfig, get_model_config
from megatron_vico.config.schema import RunConfig
from megatron_vico.convert import convert
from megatron_vico.convert.options import LAYOUTS
from megatron_vico.training.trainer import train
from tests.parity.hf_weights import assert_equal_logits, transformers_model
from tests.tensor_files import read_all, same
from tests.toy_models import make_encoder, make_language_model
from tests.training_runs import ToyData, toy_config, weights_of


def odd(base: str, *, vision: dict[str, Any], language: dict[str, Any]) -> ModelConfig:
    model = get_model_config(base)
    return replace(
        model,
        name="odd",
        vision=replace(model.vision, **vision),
        language=replace(model.language, **language),
    )


ODD = {
    "added tokens": odd("toy", vision={}, language={"vocab_size": 517}),
    "pruned": odd("toy-6b", vision={"num_layers": 1}, language={"num_layers": 3}),
    "another width": odd(
        "toy-moe",
        vision={"hidden_size": 36, "num_heads": 3, "patch_size": 4},
        language={"hidden_size": 40, "num_experts": 3, "moe_ffn_hidden_size": 24, "num_heads": 6},
    ),
}
# Of transformers' own fields; what is said of dtypes, dropout and classes may differ.
ARCHITECTURE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("image_size", "patch_size", "norm_type", "attention_bias", "use_qk_norm", "layer_norm_eps"),
    *("num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps", "hidden_act"),
    *("num_experts_per_tok", "moe_intermediate_size"),
)


def assert_same_architecture(found: Path, expected: Path) -> None:
    one, other = (files.read_json(folder / "config.json") for folder in (found, expected))
    for part in ("vision_config", "text_config"):
        stated = {name: one[part][name] for name in ARCHITECTURE if name in other[part]}
        assert stated == {name: other[part][name] for name in stated}
    assert one["image_token_id"] == other["image_token_id"]


def stage(data: ToyData, name: str, start: Path, save: Path) -> RunConfig:
    """No --model-size: the checkpoint says it."""
    return toy_config(
        data, name, train_iters=1, pretrained_checkpoint=str(start), save=str(save), lr=1e-2
    )


@pytest.mark.parametrize("name", ODD)
def test_a_model_of_no_preset_comes_in_trains_and_goes_out(
    name: str,
    toy_data: ToyData,
    tmp_path: Path,
    modules_cache: None,
    single_process_groups: None,
) -> None:
    model, source = ODD[name], tmp_path / "source"
    transformers_model(make_encoder(model), make_language_model(model)).save_pretrained(source)
    expected = read_all(source)

    start = convert.convert(source, output=tmp_path / "start", layout="megatron")
    metadata = read_metadata(start)
    described = replace(metadata.model, vir_num_heads=model.vir_num_heads)  # no router in `hf`
    assert not differences(described, model)
    assert metadata.model_size == metadata.model.name
    assert metadata.model_size.startswith("custom-")
    back = convert.convert(start, output=tmp_path / "back", layout="hf")
    assert same(read_all(back), expected)
    assert_same_architecture(back, source)

    pretrain = stage(toy_data, "pretrain", start, tmp_path / "pretrained")
    train(pretrain)
    consistency = stage(toy_data, "consistency", tmp_path / "pretrained", tmp_path / "run")
    train(consistency)
    assert resolve_model(consistency) == metadata.model
    run = tmp_path / "run"
    assert read_metadata(run) == replace(
        metadata,
        stage="consistency",
        iteration=1,
        has_optimizer=True,
        optimizer="replicated",
        trained=("vit", "connector_4x", "connector_16x", "language_model"),
    )
    encoder, language_model = weights_of(consistency, run)
    exported = {layout: tmp_path / layout for layout in LAYOUTS}
    for layout, folder in exported.items():
        convert.convert(run, output=folder, layout=layout)
    trained = read_all(exported["hf"])
    assert trained.keys() == expected.keys()
    assert any(not torch.equal(trained[key], expected[key]) for key in expected)
    assert_same_architecture(exported["hf"], source)
    assert_equal_logits(exported["hf"], encoder.eval(), language_model.eval())

    # Each of the layouts comes in again, bit for bit.
    for layout, folder in exported.items():
        again = convert.convert(folder, output=tmp_path / f"{layout}-again", layout="megatron")
        out = convert.convert(again, output=tmp_path / f"{layout}-out", layout=layout)
        assert same(read_all(out), read_all(folder))
    _, loading = AutoModel.from_pretrained(
        exported["flash"], trust_remote_code=True, output_loading_info=True, dtype=torch.float32
    )
    assert not any(loading.values()), loading
