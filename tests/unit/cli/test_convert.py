"""`vico convert`: flags that do not go together, flags without effect, and a form that the input
does not have."""

from pathlib import Path

import pytest

from megatron_vico.checkpoint.run_folder import iteration_folder
from megatron_vico.checkpoint.training_checkpoint import (
    CheckpointMetadata,
    find_iteration,
    save_checkpoint,
)
from megatron_vico.cli.main import main
from megatron_vico.config.registry import get_model_config
from megatron_vico.convert.convert import convert
from megatron_vico.convert.huggingface import safetensors_folder
from megatron_vico.convert.huggingface.config import ExportOptions
from megatron_vico.convert.megatron.reader import open_dcp
from megatron_vico.files import read_json
from tests.hf_exports import export_hf
from tests.toy_models import make_encoder, make_language_model

HEAD = "language_model.gpt.output_layer.weight"


def convert_to(output: Path, words: str, source: Path, *more: str | Path) -> int:
    """The status of `vico convert` to a folder."""
    files = ["--input", source, "--output", output, *more]
    return main(["convert", *words.split(), *map(str, files)])


TO_FLASH = "--to hf --layout flash"


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory, single_process_groups: None) -> Path:
    model = get_model_config("toy-6b")
    return export_hf(
        tmp_path_factory.mktemp("flash") / "flash",
        encoder=make_encoder(model),
        language_model=make_language_model(model),
        model=model,
        layout="flash",
        options=ExportOptions(flash_relative_threshold=0.25, max_dynamic_patch=7),
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--from megatron --to hf", "ConfigError: --to hf needs --layout: internvl, hf or flash."),
        (
            "--from megatron --to megatron",
            "ConfigError: --from megatron --to megatron converts nothing",
        ),
        (
            "--from hf --to megatron --tensor-model-parallel-size 0",
            "ConfigError: --tensor-model-parallel-size 0",
        ),
        ("--from hf --to hf --layout hf --tensor-model-parallel-size 2", "so leave it out"),
        ("--from hf --to megatron --max-dynamic-patch 4", "has no effect on a Megatron checkpoint"),
        (
            "--from hf --to megatron --ckpt-step 3",
            "ConfigError: --ckpt-step 3 has no effect with --from hf",
        ),
        ("--from hf --to megatron --max-shard-bytes 0", "ConfigError: --max-shard-bytes 0"),
        (
            "--from hf --to hf --layout hf --use-thumbnail",
            "--use-thumbnail has no effect on the hf layout",
        ),
        (
            "--from hf --to hf --layout internvl --flash-absolute-threshold 0.5",
            "has no effect on the internvl layout",
        ),
        (
            "--from hf --to hf --layout flash --flash-relative-threshold 1.5",
            "threshold 1.5: expected 0 to 1",
        ),
        (
            "--from hf --to hf --layout flash --flash-absolute-threshold nan",
            "threshold nan: expected 0 to 1",
        ),
        (
            "--from hf --to hf --layout flash --max-dynamic-patch 0",
            "--max-dynamic-patch 0: expected 1 to 256",
        ),
        (
            "--from megatron --to hf --layout hf",
            "is no megatron checkpoint; if it is one at all, --from hf.",
        ),
        (
            "--from hf --to megatron --layout internvl",
            "has the flash layout, expected internvl; give --layout flash",
        ),
    ],
)
def test_refusals(
    words: str, message: str, flash: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert_to(tmp_path / "out", words, flash) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_padding_and_what_the_config_says(
    flash: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The padding is the only effect of a parallel size; it and the config's fields survive the way
    back."""
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    sizes = "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 2"
    assert convert_to(megatron, f"--from hf --to megatron {sizes} --verify", flash) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(megatron)
    assert "note: --pipeline-model-parallel-size has no effect" in told.err
    assert "--tensor" not in told.err
    assert "verifying: 100%" in told.err
    assert open_dcp(find_iteration(megatron)).tensors[HEAD].shape[0] == 1024
    words = f"--from megatron {TO_FLASH} --flash-absolute-threshold 0.75"
    assert convert_to(back, words, megatron) == 0
    config = read_json(back / "config.json")
    assert (config["flash_relative_threshold"], config["flash_absolute_threshold"]) == (0.25, 0.75)
    assert config["max_dynamic_patch"] == 7
    assert (back / "model.safetensors").read_bytes() == (flash / "model.safetensors").read_bytes()


def test_an_input_that_is_not_there_and_one_step_of_a_run(
    flash: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, words = tmp_path / "out", f"--from megatron {TO_FLASH}"
    assert convert_to(out, words, tmp_path / "typo") == 2
    assert "typo: no such folder" in capsys.readouterr().err
    run = convert(flash, output=tmp_path / "run", layout="megatron")
    assert convert_to(out, words, find_iteration(run)) == 2
    assert f"name the run's folder, {run}" in capsys.readouterr().err


def test_the_step_of_a_run_that_is_asked_for(
    flash: Path, tmp_path: Path, single_process_groups: None
) -> None:
    run = convert(flash, output=tmp_path / "run", layout="megatron")
    model = get_model_config("toy-6b")
    modules = {
        "encoder": make_encoder(model, seed=5),
        "language_model": make_language_model(model, seed=5),
    }
    save_checkpoint(
        iteration_folder(run, 5),
        modules=modules,
        metadata=CheckpointMetadata(model_size="toy-6b", stage="pretrain"),
    )
    words = f"--from megatron {TO_FLASH}"
    assert convert_to(tmp_path / "first", f"{words} --ckpt-step 0", run) == 0
    assert convert_to(tmp_path / "latest", words, run) == 0
    first, latest = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "latest")
    )
    assert first == (flash / "model.safetensors").read_bytes()
    assert latest != first


def test_tokenizers_that_are_not_there(
    flash: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user is told that an export has none; a wrong path is found before the weights are
    written."""
    words = f"--from hf {TO_FLASH}"
    assert convert_to(tmp_path / "out", words, flash) == 0
    assert "note: no tokenizer came with the input" in capsys.readouterr().err
    monkeypatch.setattr(safetensors_folder, "write_shard", None)
    typo = ("--tokenizer-model", tmp_path / "typo")
    assert convert_to(tmp_path / "never", words, flash, *typo) == 2
    assert "typo: found neither a folder nor" in capsys.readouterr().err
