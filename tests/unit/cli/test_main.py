"""The dispatch: which command is found, what an error looks like, how light help is."""

import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from megatron_vico.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[3]


def test_each_command_has_a_module_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert callable(importlib.import_module(f"megatron_vico.cli.{name}").main)
        if name in ("train", "plan"):
            assert main([name, "--help"]) == 0  # their flags come from several parsers
        else:
            with pytest.raises(SystemExit) as stop:
                main([name, "--help"])
            assert stop.value.code == 0
        assert f"vico {name}" in capsys.readouterr().out


def test_each_module_is_a_command() -> None:
    shared = {"__init__", "main", "command_line", "engine_flags", "rank_failure", "shard_checks"}
    shared |= {"checkpoint_verify"}  # a word after `checkpoint`
    modules = {path.stem for path in (ROOT / "megatron_vico" / "cli").glob("*.py")} - shared
    assert modules == set(COMMANDS)


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and summary in text for name, summary in COMMANDS.items())


def test_no_command_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["trian"]) == 2
    assert "unknown command 'trian'; did you mean 'train'?" in capsys.readouterr().err


def test_a_users_error_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for words, message in {
        "train --lrr 3": "ConfigError: command line: unknown option --lrr; did you mean '--lr'?",
        "train --recipe no/such.yaml": "ConfigError: no/such.yaml: cannot read the recipe",
        f"checkpoint {tmp_path}": f"CheckpointError: {tmp_path} is no checkpoint",
        f"generate --load {tmp_path} --prompt ?": "CheckpointError: ",
        "generate --load x --prompt ? --image gone.jpg": "SampleError: gone.jpg: No such file",
        "plot table gone.json": "ConfigError: gone.json: No such file",
        "plot loss a=gone --output x.png": "ConfigError: gone: no such file",
    }.items():
        assert main(words.split()) == 2, words
        error = capsys.readouterr().err
        assert error.startswith(message), error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("rank", "options", "heard"),
    [("0", [], True), ("1", [], False), ("1", ["default"], True), (None, [], True)],
)
def test_libraries_warn_on_one_rank(
    rank: str | None, options: list[str], heard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rank is not None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "warnoptions", options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(["doctor"]) == 0
        warnings.warn("from a library", stacklevel=1)
    assert ("from a library" in [str(each.message) for each in caught]) == heard


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, which has imported nothing."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_module_form_and_light_help() -> None:
    done = run_python(
        "import sys, runpy; sys.argv = ['vico', '--help']\n"
        "try: runpy.run_module('megatron_vico', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules"
    )
    assert "usage: vico COMMAND" in done.stdout


def test_help_of_every_command_is_light() -> None:
    run_python(
        "import sys; from megatron_vico.cli.main import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit as stop: assert not stop.code\n"
        "    assert 'torch' not in sys.modules and 'megatron' not in sys.modules, name"
    )


def test_doctor_needs_no_megatron() -> None:
    done = run_python(
        "import sys; from megatron_vico.cli.main import main; status = main(['doctor'])\n"
        "assert 'megatron.core' not in sys.modules; sys.exit(status)"
    )
    names = "torch megatron-core CUDA NCCL gloo transformer-engine flash-attn apex"
    assert all(f" {name} " in done.stdout for name in names.split())
