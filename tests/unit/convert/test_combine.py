"""A vision tower and a language model in folders of their own, taken apart here or saved by
transformers itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_vico.cli.main import main
from megatron_vico.config.registry import get_model_config
from megatron_vico.convert import convert
from megatron_vico.convert.combine import open_parts
from megatron_vico.convert.names.internvl import Layout
from megatron_vico.errors import CheckpointError
from tests.toy_models import make_encoder, make_language_model

VISION = {"internvl": ("vision_model.", "vision_config"), "hf": ("vision_tower.", "vision_config")}
LANGUAGE = {"internvl": ("language_model.", "llm_config"), "hf": ("language_model.", "text_config")}

Apart = Callable[[str, Layout], tuple[Path, Path, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory, single_process_groups: None) -> Apart:
    """A toy's tower and language model in two folders, and all tensors of the folder they were cut
    from."""
    root = tmp_path_factory.mktemp("parts")

    def make(size: str, layout: Layout) -> tuple[Path, Path, dict[str, Tensor]]:
        folder = root / f"{size}-{layout}"
        if not folder.exists():
            model = get_model_config(size)
            encoder, language_model = make_encoder(model), make_language_model(model)
            convert.export_hf(
                folder, encoder=encoder, language_model=language_model, model=model, layout=layout
            )
        tensors = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        vit = write_part(root / f"{folder.name}-vit", tensors, config, VISION[layout])
        llm = write_part(root / f"{folder.name}-llm", tensors, config, LANGUAGE[layout])
        return vit, llm, tensors

    return make


def write_part(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], names: tuple[str, str]
) -> Path:
    prefix, part = names
    folder.mkdir(exist_ok=True)
    own = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    save_file(own, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config[part]))
    return folder


def copy_of(
    folder: Path, target: Path, edit: Callable[[dict[str, Tensor], dict[str, Any]], None]
) -> Path:
    """A folder with other tensors and another config."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    edit(tensors, config)
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("layout", ["internvl", "hf"])
@pytest.mark.parametrize("size", ["toy", "toy-6b", "toy-moe"])
def test_together_they_are_the_folder_without_its_connector(
    size: str, layout: Layout, apart: Apart
) -> None:
    vit, llm, whole = apart(size, layout)
    parts = open_parts(vit, llm)
    assert (parts.model.name, parts.layout) == (size, layout)
    connector = {name for name in whole if name.startswith(("mlp1.", "multi_modal_projector."))}
    assert len(connector) == 6
    assert parts.tensors.keys() == whole.keys() - connector
    for name in parts.tensors:
        assert torch.equal(parts.read(name), whole[name]), name
        assert parts.tensors[name].shape == tuple(whole[name].shape)
    assert open_parts(vit, llm, model_size=size).model.name == size


def test_a_tied_head_is_a_copy_of_the_embedding(apart: Apart, tmp_path: Path) -> None:
    vit, llm, whole = apart("toy", "internvl")

    def tie(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        del tensors["lm_head.weight"]
        config["tie_word_embeddings"] = True

    tied = copy_of(llm, tmp_path / "tied", tie)
    parts = open_parts(vit, tied)
    embedding = whole["language_model.model.embed_tokens.weight"]
    assert torch.equal(parts.read("language_model.lm_head.weight"), embedding)
    assert not torch.equal(embedding, whole["language_model.lm_head.weight"])

    def cut(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        del tensors["lm_head.weight"]

    untied = copy_of(llm, tmp_path / "untied", cut)
    message = (
        r"untied, as a part of toy: missing tensors: lm_head\.weight; .*tie_word_embeddings in its"
        r" config"
    )
    with pytest.raises(CheckpointError, match=message):
        open_parts(vit, untied)


@pytest.mark.parametrize("size", ["toy-6b", "toy-moe"])
def test_what_transformers_saves_is_understood(size: str, tmp_path: Path) -> None:
    """Names on disk and fields of config.json are transformers' own, dense with a tied head and
    MoE."""
    import transformers

    model = get_model_config(size)
    vision, language = model.vision, model.language
    tower = transformers.InternVLVisionModel(
        transformers.InternVLVisionConfig(
            hidden_size=vision.hidden_size,
            num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_heads,
            intermediate_size=vision.ffn_hidden_size,
            image_size=[vision.image_size] * 2,
            patch_size=[vision.patch_size] * 2,
            norm_type=vision.norm_type,
            attention_bias=vision.qkv_bias,
            use_qk_norm=vision.qk_norm,
        )
    )
    fields: dict[str, Any] = {
        "hidden_size": language.hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_query_groups,
        "head_dim": language.head_dim,
        "intermediate_size": language.ffn_hidden_size,
        "vocab_size": language.vocab_size,
        "rope_parameters": {"rope_type": "default", "rope_theta": language.rope_theta},
    }
    if language.num_experts is None:
        llm = transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**fields, tie_word_embeddings=True)
        )
    else:
        fields |= {
            "num_experts": language.num_experts,
            "num_experts_per_tok": language.moe_top_k,
            "moe_intermediate_size": language.moe_ffn_hidden_size,
            "norm_topk_prob": True,
        }
        llm = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**fields))
    tower.save_pretrained(tmp_path / "vit")
    llm.save_pretrained(tmp_path / "llm")
    parts = open_parts(tmp_path / "vit", tmp_path / "llm")
    assert (parts.model.name, parts.layout) == (size, "hf")
    assert torch.equal(parts.read("vision_tower.embeddings.cls_token"), tower.embeddings.cls_token)
    embedding = parts.read("language_model.model.embed_tokens.weight")
    assert torch.equal(embedding, parts.read("language_model.lm_head.weight")) is (
        language.num_experts is None
    )


def test_what_does_not_belong_together_is_refused_by_field(apart: Apart) -> None:
    vit, llm, _ = apart("toy", "internvl")
    _, other_llm, _ = apart("toy-moe", "internvl")
    # Any tower may go with any language model that has room for the image token.
    with pytest.raises(CheckpointError, match="is 151671, expected less than vocab_size 512"):
        open_parts(vit, other_llm)
    with pytest.raises(
        CheckpointError,
        match=r"is toy, expected toy-moe: vision\.hidden_size is 96, toy-moe has 32",
    ):
        open_parts(vit, llm, model_size="toy-moe")
    with pytest.raises(
        CheckpointError,
        match=r"model_type is 'qwen3', expected 'intern_vit_6b' or 'internvl_vision'",
    ):
        open_parts(llm, llm)
    with pytest.raises(CheckpointError, match=r"llm_config\.model_type is 'intern_vit_6b'"):
        open_parts(vit, vit)
    with pytest.raises(CheckpointError, match=r"no such folder"):
        open_parts(vit, llm / "absent")


def test_a_tensor_too_many_or_too_few_is_named_as_in_its_folder(
    apart: Apart, tmp_path: Path
) -> None:
    vit, llm, _ = apart("toy", "internvl")

    def rename(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        tensors["encoder.layers.0.ls3"] = tensors.pop("encoder.layers.0.ls2")

    broken = copy_of(vit, tmp_path / "broken", rename)
    message = (
        r"broken, as a part of toy: missing tensors: encoder\.layers\.0\.ls2; .*maps:"
        r" encoder\.layers\.0\.ls3\."
    )
    with pytest.raises(CheckpointError, match=message):
        open_parts(broken, llm)


@pytest.mark.parametrize(("size", "layout"), [("toy-6b", "internvl"), ("toy-moe", "hf")])
def test_a_pretraining_starts_from_two_parts(
    size: str, layout: Layout, apart: Apart, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vit, llm, tensors = apart(size, layout)
    words = [
        "--from",
        "parts",
        "--to",
        "megatron",
        "--vit",
        str(vit),
        "--llm",
        str(llm),
        "--verify",
    ]
    for name in ("one", "two"):
        assert (
            main(["convert", *words, "--model-size", size, "--output", str(tmp_path / name)]) == 0
        )
        assert "without image tokens" in capsys.readouterr().err
        back = [
            "--from",
            "megatron",
            "--to",
            "hf",
            "--layout",
            layout,
            "--input",
            str(tmp_path / name),
        ]
        assert main(["convert", *back, "--output", str(tmp_path / f"{name}-hf")]) == 0
    made, again = (
        load_file(tmp_path / f"{name}-hf" / "model.safetensors") for name in ("one", "two")
    )
    assert made.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(made[name], again[name])  # the connector comes from the seed
        is_connector = name.startswith(("mlp1.", "multi_modal_projector."))
        assert is_connector or torch.equal(made[name], tensor), name
        assert torch.isfinite(made[name]).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--from parts --to megatron --vit a",
            "--from parts takes --vit and --llm, and no other input",
        ),
        (
            "--from hf --to megatron --input a --llm b",
            "--from hf takes --input, and no other input",
        ),
        (
            "--from parts --to hf --layout hf --vit a --llm b",
            "--from parts makes a Megatron checkpoint",
        ),
    ],
)
def test_flags_that_do_not_go_together(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", *words.split(), "--output", "never"]) == 2
    assert message in capsys.readouterr().err
