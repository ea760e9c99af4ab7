"""What a checkpoint says it is, in files of every age, and which model a run is therefore of."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vico.checkpoint.run_folder import (
    CheckpointMetadata,
    metadata_of,
    model_of_run,
    read_metadata,
    resolve_model,
)
from megatron_vico.config.flags import parse
from megatron_vico.config.registry import MODELS, named
from megatron_vico.convert.huggingface.config import ExportOptions, model_json
from megatron_vico.errors import CheckpointError, ConfigError
from megatron_vico.files import read_json
from tests.run_folders import write_step

TOY = MODELS["toy"]
ODD = named(replace(TOY, language=replace(TOY.language, vocab_size=517)))


def test_a_presets_file_has_the_keys_it_always_had(tmp_path: Path) -> None:
    path = write_step(tmp_path, 3) / "checkpoint.json"
    assert json.loads(path.read_text()) == {
        "format_version": 1,
        "has_optimizer": False,
        "iteration": 0,
        "layout": "",
        "model_size": "toy",
        "optimizer": None,
        "stage": "warmup",
    }
    # As it was written before layout and optimizer were noted.
    path.write_text('{"format_version": 1, "iteration": 0, "model_size": "toy", "stage": "warmup"}')
    assert read_metadata(tmp_path) == CheckpointMetadata(model_size="toy", stage="warmup")
    assert model_of_run(tmp_path) is TOY


def test_a_model_that_is_no_preset_is_described(tmp_path: Path) -> None:
    write_step(tmp_path, 3, model=ODD)
    assert model_of_run(tmp_path) == ODD
    for model in (TOY, replace(ODD, name="toy")):  # a name alone does not make it a preset
        assert (metadata_of(model, stage="").description is None) == (model is TOY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format version 99, this program reads 1"),
        ({"model": {}}, "not a checkpoint's metadata: 'vision'"),
        ({"model": {"vision": {}}}, "not a checkpoint's metadata: .*hidden_size"),
        ({"model": {"vision": [], "language": 3}}, "not a checkpoint's metadata: list, expected"),
        ({"colour": "red"}, "not a checkpoint's metadata: .*colour"),
        ({"iteration": "x"}, "not a checkpoint's metadata: 'iteration' is 'x'"),
        ({"trained": ["vit", {}]}, "not a checkpoint's metadata: 'trained' is .'vit', {}"),
        ({"has_optimizer": None}, "not a checkpoint's metadata: 'has_optimizer' is None"),
    ],
)
def test_files_of_other_programs_are_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = write_step(tmp_path, 3) / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        read_metadata(tmp_path)


def test_model_size_is_a_name_or_a_file_or_that_of_the_checkpoint(tmp_path: Path) -> None:
    run, start, empty = tmp_path / "run", tmp_path / "start", tmp_path / "empty"
    write_step(run, 3, model=ODD)
    write_step(run, 5, model=MODELS["toy-moe"])
    write_step(start, 3, model=MODELS["toy-6b"])
    config = model_json(ODD, layout="flash", dtype="float32", options=ExportOptions())
    (tmp_path / "config.json").write_text(json.dumps(config))
    for words, model in {
        "": TOY,
        f"--load {empty}": TOY,
        "--model-size internvl3_5-8b": MODELS["internvl3_5-8b"],
        f"--load {run} --model-size toy-6b": MODELS["toy-6b"],
        f"--load {run}": MODELS["toy-moe"],
        f"--load {run} --ckpt-step 3": ODD,
        f"--load {run} --pretrained-checkpoint {start} --model-size checkpoint": MODELS["toy-moe"],
        f"--load {empty} --pretrained-checkpoint {start}": MODELS["toy-6b"],
        f"--model-size {tmp_path}": ODD,
        f"--model-size {tmp_path / 'config.json'}": ODD,
    }.items():
        assert resolve_model(parse(words.split())) == model, words
    for words, message in {
        "--model-size checkpoint": "there is no --pretrained-checkpoint, and none in --load",
        "--model-size toi": "unknown model size 'toi'; did you mean 'toy'.* path of a config.json",
        "--pretrained-checkpoint gone": "gone: no such file .* name the size with --model-size",
    }.items():
        with pytest.raises(ConfigError, match=message):
            resolve_model(parse(words.split()))


def test_an_expected_model_is_compared_field_by_field(tmp_path: Path) -> None:
    write_step(tmp_path, 3, model=ODD)
    assert model_of_run(tmp_path, expected="checkpoint") == ODD
    message = r"is of custom-3x128-\w{6}, expected toy: language\.vocab_size is 517, toy has 512"
    with pytest.raises(CheckpointError, match=message):
        model_of_run(tmp_path, expected="toy")


def test_a_runs_model_is_known_without_torch() -> None:
    code = "import sys, megatron_vico.checkpoint.run_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_mark_before_json_is_skipped(tmp_path: Path) -> None:
    """As some editors begin."""
    (tmp_path / "some.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "some.json") == {"a": 1}
