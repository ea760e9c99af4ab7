"""`vico train --check files`: what can be known without building the model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vico.checkpoint.run_folder import find_iteration
from megatron_vico.cli.main import main
from megatron_vico.config.flags import to_yaml
from megatron_vico.config.registry import get_model_config
from megatron_vico.config.schema import RunConfig
from megatron_vico.convert.convert import convert
from megatron_vico.data.encode.tokenizer import load_tokenizer, train_sentencepiece
from tests.hf_exports import export_hf
from tests.toy_models import make_encoder, make_language_model
from tests.training_runs import ToyData

Check = Callable[..., str]


@pytest.fixture
def check(
    stage_config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Check:
    """check(**options): the error of a consistency run; empty where all is well."""

    def run(**options: object) -> str:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(to_yaml(stage_config("consistency", **options)))
        status = main(["train", "--recipe", str(recipe), "--check", "files"])
        told = capsys.readouterr()
        assert (status, bool(told.err)) in ((0, False), (2, True))
        return told.err

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, single_process_groups: None) -> Path:
    """A Hugging Face folder of the toy, and a checkpoint of another size."""
    root = tmp_path_factory.mktemp("folders")
    for name in ("toy", "toy-6b"):
        model = get_model_config(name)
        modules = {"encoder": make_encoder(model), "language_model": make_language_model(model)}
        export_hf(root / f"{name}-hf", **modules, model=model, layout="flash")  # type: ignore[arg-type]
    convert(root / "toy-6b-hf", output=root / "toy-6b", layout="megatron")
    return root


def test_all_is_well(check: Check) -> None:
    assert check() == ""


@pytest.mark.parametrize("option", ["pretrained_checkpoint", "reference_load", "load"])
@pytest.mark.parametrize("size", ["toy", None])
def test_a_hugging_face_folder(option: str, size: str | None, check: Check, folders: Path) -> None:
    error = check(**{option: str(folders / "toy-hf")}, model_size=size)
    assert "toy-hf is a Hugging Face folder, not a run's; convert it first" in error


def test_a_checkpoint_of_another_size(check: Check, folders: Path) -> None:
    other = str(folders / "toy-6b")
    found = check(reference_load=other)
    assert f"--reference-load {other} is of toy-6b, this run is of toy: vision.hidden_size" in found
    assert "is of toy-6b" in check(pretrained_checkpoint=other, model_size="toy")
    found = check(pretrained_checkpoint=other)
    assert "--reference-load" in found
    assert "is of toy, this run is of toy-6b" in found


def test_weights_that_cannot_be_resumed(check: Check, folders: Path, tmp_path: Path) -> None:
    run = convert(folders / "toy-hf", output=tmp_path / "run", layout="megatron")
    assert "holds weights only" in check(load=str(run), train_iters=10)


def test_a_run_that_has_ended(check: Check, base_checkpoint: Path) -> None:
    assert "has done 2 steps and --train-iters is 2" in check(
        load=str(base_checkpoint), train_iters=2
    )


def test_a_checkpoint_without_some_tensors(
    check: Check, base_checkpoint: Path, folders: Path, tmp_path: Path
) -> None:
    """Its metadata say another model than its tensors are of."""
    run = tmp_path / "run"
    shutil.copytree(folders / "toy-6b", run)
    path = find_iteration(run) / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_size": "toy"}))
    assert "wrong shape or format: encoder." in check(pretrained_checkpoint=str(run))


def test_a_tokenizer_of_another_model(check: Check, toy_data: ToyData, tmp_path: Path) -> None:
    other = train_sentencepiece(
        ["others 12 words"] * 9, model_prefix=tmp_path / "other", vocab_size=300
    )
    found = check(tokenizer_model=str(other))
    assert f"{toy_data.shards}: indexed with tokenizer" in found
    load_tokenizer(toy_data.tokenizer).save_to(tmp_path / "moved")
    file = tmp_path / "moved" / "tokenizer.json"
    contents = json.loads(file.read_text())
    vocab, added = contents["model"]["vocab"], contents["added_tokens"]
    for image, last in ((5, 4), (4, 5)):
        token = next(each for each in added if each["id"] == image)
        token["id"] = -last
    for token in added:
        token["id"] = abs(token["id"])
        vocab[token["content"]] = token["id"]
    file.write_text(json.dumps(contents | {"added_tokens": sorted(added, key=lambda t: t["id"])}))
    assert "<IMG_CONTEXT> is 4, but toy expects 5" in check(tokenizer_model=str(tmp_path / "moved"))


def test_another_tiling_than_the_index(check: Check) -> None:
    assert "indexed with EncodingSettings" in check(max_dynamic_patch=2)
