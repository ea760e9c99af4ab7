"""A vision tower and a language model apart, cut from a folder here or saved by transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_vico.cli.main import main
from megatron_vico.config.registry import get_model_config
from megatron_vico.convert.combine import open_parts
from megatron_vico.convert.open import open_source
from megatron_vico.convert.options import Layout
from megatron_vico.errors import CheckpointError
from tests.parity.hf_weights import transformers_config
from tests.tensor_files import read_all, same_bits
from tests.unit.convert.folders import MakeFolder, Tensors, changed_copy

VISION = {"internvl": ("vision_model.", "vision_config"), "hf": ("vision_tower.", "vision_config")}
LANGUAGE = {"internvl": ("language_model.", "llm_config"), "hf": ("language_model.", "text_config")}
EMBEDDING = "language_model.gpt.embedding.word_embeddings.weight"
HEAD = "language_model.gpt.output_layer.weight"
CONNECTOR = "encoder.connector_4x."

Apart = Callable[[str, Layout], tuple[Path, Path]]


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory, folder_of: MakeFolder) -> Apart:
    """A toy's tower and language model in two folders."""
    root = tmp_path_factory.mktemp("parts")

    def make(size: str, layout: Layout) -> tuple[Path, Path]:
        folder = folder_of(size, layout)
        return (
            write_part(root / f"{folder.name}-vit", folder, VISION[layout]),
            write_part(root / f"{folder.name}-llm", folder, LANGUAGE[layout]),
        )

    return make


def write_part(part: Path, folder: Path, names: tuple[str, str]) -> Path:
    prefix, config = names
    part.mkdir(exist_ok=True)
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in read_all(folder).items()
        if name.startswith(prefix)
    }
    save_file(tensors, part / "model.safetensors")
    contents = json.loads((folder / "config.json").read_text())
    (part / "config.json").write_text(json.dumps(contents[config]))
    return part


@pytest.mark.parametrize("layout", ["internvl", "hf"])
@pytest.mark.parametrize("size", ["toy", "toy-6b", "toy-moe"])
def test_together_they_are_the_folder_without_its_connector(
    size: str, layout: Layout, apart: Apart, folder_of: MakeFolder
) -> None:
    parts, whole = open_parts(*apart(size, layout)), open_source(folder_of(size, layout))
    assert (parts.model.name, parts.layout, parts.problems) == (size, layout, ())
    connector = {name for name in whole.tensors if name.startswith(CONNECTOR)}
    assert len(connector) == 6
    assert parts.tensors.keys() == whole.tensors.keys() - connector
    for name, info in parts.tensors.items():
        assert info == whole.tensors[name]
        assert same_bits(parts.read_tensor(name), whole.read_tensor(name)), name
    assert open_parts(*apart(size, layout), model_size=size).model.name == size


def test_a_tied_head_is_a_copy_of_the_embedding(
    apart: Apart, folder_of: MakeFolder, tmp_path: Path
) -> None:
    vit, llm = apart("toy", "internvl")

    def cut(tensors: Tensors) -> None:
        del tensors["lm_head.weight"]

    def tie(config: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = True

    tied = open_parts(vit, changed_copy(llm, tmp_path / "tied", tensors=cut, config=tie))
    whole = open_source(folder_of("toy", "internvl"))
    assert torch.equal(tied.read_tensor(HEAD), whole.read_tensor(EMBEDDING))
    assert not torch.equal(whole.read_tensor(HEAD), whole.read_tensor(EMBEDDING))
    untied = changed_copy(llm, tmp_path / "untied", tensors=cut)
    message = r"part of toy: missing tensors: lm_head\.weight\. .*tie_word_embeddings in its config"
    with pytest.raises(CheckpointError, match=message):
        open_parts(vit, untied)


@pytest.mark.parametrize("size", ["toy-6b", "toy-moe"])
def test_what_transformers_saves_is_understood(size: str, tmp_path: Path) -> None:
    """Names on disk and fields of config.json are its own, dense with a tied head and MoE."""
    import transformers

    model = get_model_config(size)
    config = transformers_config(model)
    tower, text = transformers.InternVLVisionModel(config.vision_config), config.text_config
    text.tie_word_embeddings = model.language.num_experts is None
    llm = transformers.AutoModelForCausalLM.from_config(text)
    tower.save_pretrained(tmp_path / "vit")
    llm.save_pretrained(tmp_path / "llm")
    parts = open_parts(tmp_path / "vit", tmp_path / "llm")
    assert (parts.model.name, parts.layout) == (size, "hf")
    class_token = parts.read_tensor("encoder.vit.class_token")
    assert torch.equal(class_token, tower.embeddings.cls_token)
    is_tied = torch.equal(parts.read_tensor(EMBEDDING), parts.read_tensor(HEAD))
    assert is_tied is (model.language.num_experts is None)


def test_what_does_not_belong_together_is_refused_by_field(apart: Apart) -> None:
    vit, llm = apart("toy", "internvl")
    _, other_llm = apart("toy-moe", "internvl")
    # Any tower may go with any language model that has room for the image token.
    with pytest.raises(CheckpointError, match="is 151671, expected less than vocab_size 512"):
        open_parts(vit, other_llm)
    message = r"is toy, expected toy-moe: vision\.hidden_size is 96, toy-moe has 32"
    with pytest.raises(CheckpointError, match=message):
        open_parts(vit, llm, model_size="toy-moe")
    message = r"model_type is 'qwen3', expected 'intern_vit_6b' or 'internvl_vision'"
    with pytest.raises(CheckpointError, match=message):
        open_parts(llm, llm)
    with pytest.raises(CheckpointError, match=r"llm_config\.model_type is 'intern_vit_6b'"):
        open_parts(vit, vit)
    with pytest.raises(CheckpointError, match=r"no such folder"):
        open_parts(vit, llm / "absent")


def test_a_tensor_too_many_or_too_few_is_named_as_in_its_folder(
    apart: Apart, tmp_path: Path
) -> None:
    vit, llm = apart("toy", "internvl")

    def rename(tensors: Tensors) -> None:
        tensors["encoder.layers.0.ls3"] = tensors.pop("encoder.layers.0.ls2")

    broken = changed_copy(vit, tmp_path / "broken", tensors=rename)
    message = (
        r"broken, as a part of toy: missing tensors: encoder\.layers\.0\.ls2; .*maps:"
        r" encoder\.layers\.0\.ls3\."
    )
    with pytest.raises(CheckpointError, match=message):
        open_parts(broken, llm)


@pytest.mark.parametrize(("size", "layout"), [("toy-6b", "internvl"), ("toy-moe", "hf")])
def test_a_pretraining_starts_from_two_parts(
    size: str,
    layout: Layout,
    apart: Apart,
    folder_of: MakeFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    vit, llm = map(str, apart(size, layout))
    words = ["convert", "--from", "parts", "--to", "megatron", "--vit", vit, "--llm", llm]
    words += ["--verify", "--model-size", size, "--output"]
    for name in ("one", "two"):
        assert main([*words, str(tmp_path / name)]) == 0
        assert "without image tokens" in capsys.readouterr().err
    one, two = (open_source(tmp_path / name) for name in ("one", "two"))
    whole = open_source(folder_of(size, layout))
    for name in one.tensors:
        tensor = one.read_tensor(name)
        assert torch.isfinite(tensor).all()
        assert same_bits(tensor, two.read_tensor(name)), "the connectors come from the seed"
        if name in whole.tensors and not name.startswith(CONNECTOR):
            assert same_bits(tensor, whole.read_tensor(name)), name


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
