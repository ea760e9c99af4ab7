"""`vico status`: what scripts that start a stage again ask for."""

import json
from pathlib import Path

import pytest

from megatron_vico.checkpoint.run_folder import point_to
from megatron_vico.cli.main import main
from tests.run_folders import write_step


# YAML writes these in quotes, or as something else than text.
@pytest.mark.parametrize("name", ["plain", "2026-11-28", "1e3", "null", "yes", "a b: #c", "'q'"])
def test_a_finished_stage_is_recognised_whatever_its_folder_is_called(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_step(Path(name), 2)
    Path("recipe.yaml").write_text(f"stage: router\ntrain_iters: 2\nsave: {json.dumps(name)}\n")
    for words in (["--recipe", "recipe.yaml"], ["--train-iters=2", f"--save={name}"]):
        assert main(["status", *words]) == 0
        assert json.loads(capsys.readouterr().out)["save"] == name
        assert main(["status", "--get", "checkpoint", *words]) == 0
        assert capsys.readouterr().out == f"{name}/iter_0000002\n"


def test_steps_that_are_left_are_status_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    words = f"status --stage warmup --train-iters 5 --save {folder}".split()
    assert main(words) == 3
    state = json.loads(capsys.readouterr().out)
    assert (state["stage"], state["iteration"], state["checkpoint"]) == ("warmup", 0, None)
    write_step(folder, 4)
    assert main([*words, "--get", "iteration"]) == 3
    assert main([*words, "--get", "pretrained_checkpoint"]) == 3
    assert capsys.readouterr().out == "4\n\n"
    point_to(folder, 5)
    assert main(words) == 2
    assert "iter_0000005 is no finished checkpoint" in capsys.readouterr().err
    assert main(["status", "--stage", "warmup"]) == 2
    assert "--save is not set" in capsys.readouterr().err
