"""The dispatch: which command is found, what an error looks like, how light help is."""

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from megatron_vico.cli.main import COMMANDS, main
from megatron_vico.errors import CheckpointError, ConfigError, SampleError, WorkerError

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
        f"generate --load {tmp_path} --prompt ? --image gone.jpg": "SampleError: gone.jpg: No such",
    }.items():
        assert main(words.split()) == 2, words
        error = capsys.readouterr().err
        assert error.startswith(message), error
        assert error.count("\n") == 1


RUN = "--load {0}"
FLAGS = {
    f"generate {RUN} --prompt ? --temperature nan": "--temperature nan: expected 0 or more",
    f"generate {RUN} --prompt ? --top-p 0": "--top-p 0.0: expected a share above 0",
    f"generate {RUN} --prompt ? --stop=": "--stop '': every answer would end",
    f"generate {RUN} --prompt ? --num-frames 3": "--num-frames 3 has no effect without",
    f"generate {RUN} --prompt ? --num-frames 0": "--num-frames 0: expected 1 or more",
    f"evaluate {RUN} --jsonl x --limit 0": "--limit 0: expected 1 or more",
    f"evaluate {RUN} --jsonl x --output {{0}}": "--output {0}: a folder, expected the name of a",
    f"evaluate {RUN} --jsonl x --write-plans {{0}}/no/x": "--write-plans {0}/no/x: {0}/no is no f",
    f"serve {RUN} --port 70000": "--port 70000: expected 0 to 65535",
    f"serve {RUN} --host=": "--host '': expected a name",
    f"serve {RUN} --api-key=": "--api-key '': expected a key",
    f"serve {RUN} --request-timeout inf": "--request-timeout inf: expected 0.001 or more",
    "shards inspect {0} --samples -1": "--samples -1: expected 0 or more",
    "shards inspect {0} --seq-length 0": "--seq-length 0: expected 1 or more",
    "shards inspect {0} --picture {0}/x.txt": "--picture {0}/x.txt: expected a name that ends in",
    "plot loss a={0} --output {0}/no/x.png": "--output {0}/no/x.png: {0}/no is no folder",
    "table 1 a=b@none --results x --log x --output {0}": "--output {0}: a folder",
    "plan --packs 0": "--packs 0: expected 1 or more",
}


@pytest.mark.parametrize("words", FLAGS)
def test_a_flag_that_makes_no_sense_is_refused_before_any_work(
    words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(words.format(tmp_path).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ConfigError: {FLAGS[words].format(tmp_path)}"), error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_errors_of_disk_and_memory_are_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(words: list[str]) -> None:
        raise OSError(28, "No space left on device", "a\x1b[2Jb")

    monkeypatch.setattr("megatron_vico.cli.doctor.main", fail)
    assert main(["doctor"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("OSError: [Errno 28] No space left on device: 'a\\x1b[2Jb' (from /")
    assert error.count("\n") == 1


def test_what_strangers_wrote_moves_no_cursor(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\x1b[2J\x07\u202etxt\u2066\x9b\ttab\nnext"
    safe = "\\x1b[2J\\x07\\u202etxt\\u2066\\x9b\ttab\nnext"

    def say(words: list[str]) -> None:
        print(text)
        print(f"\r{text}", file=sys.stderr)
        raise SampleError(text)

    monkeypatch.setattr("megatron_vico.cli.doctor.main", say)
    assert main(["doctor"]) == 2
    shown = capsys.readouterr()
    assert shown.out == f"{safe}\n"
    assert shown.err == f"\r{safe}\nSampleError: {safe}\n"
    for error in (ConfigError, SampleError, WorkerError, CheckpointError):
        assert str(error(text)) == safe


def test_torchrun_is_told_the_line_and_no_traceback(tmp_path: Path) -> None:
    told = tmp_path / "error.json"
    environment = {"WORLD_SIZE": "2", "RANK": "1", "TORCHELASTIC_ERROR_FILE": str(told)}
    done = run_python(
        "import sys; from megatron_vico.cli.main import main\n"
        "sys.exit(main(['train', '--lrr', '3']))",
        status=2,
        **environment,
    )
    line = "ConfigError: command line: unknown option --lrr; did you mean '--lr'?"
    assert done.stderr == f"rank 1: {line}\n"
    message = json.loads(told.read_text())["message"]
    # torchrun prints the latter, under its own traceback.
    assert [message["message"], message["extraInfo"]["py_callstack"]] == [line, line]


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


def run_python(code: str, *, status: int = 0, **environ: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, which has imported nothing."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environ
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done


def test_module_form_and_light_help() -> None:
    done = run_python(
        "import sys, runpy; sys.argv = ['vico', '--help']\n"
        "try: runpy.run_module('megatron_vico', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'megatron' not in sys.modules"
    )
    assert "usage: vico COMMAND" in done.stdout


def test_help_of_every_command_and_a_wrong_flag_are_light() -> None:
    done = run_python(
        "import sys; from megatron_vico.cli.main import COMMANDS, main\n"
        "for word in ('--help', '--no-such-flag'):\n"
        "    for name in COMMANDS:\n"
        "        if (name, word) == ('doctor', '--no-such-flag'): continue\n"
        "        try: main([name, word])\n"
        "        except SystemExit as stop: assert not stop.code or word != '--help'\n"
        "        assert 'torch' not in sys.modules and 'megatron' not in sys.modules, name"
    )
    assert "Warning" not in done.stderr


ACTIONS = {
    "shards": ("make", "index", "inspect", "verify"),
    "plot": ("loss", "trace", "table"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_a_text_and_a_default(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for action in ACTIONS.get(command, ("",)):
        with contextlib.suppress(SystemExit):
            main([command, *action.split(), "--help"])
        text = capsys.readouterr().out
        # A flag, and what follows until the next one or the next title.
        flags = re.findall(r"(?m)^ {2,4}(--?[a-z].*(?:\n {6,}\S.*)*)", text)
        assert flags or command == "doctor"
        for flag in flags:
            words = " ".join(flag.split())
            if words.endswith(","):
                continue  # its other name, and their text, are in the next line
            said = re.sub(r"--?[\w-]+,?|\{.*?\}|\[.*?\]|[A-Z_.]{3,}|\(.*?\)|\b[A-Z]\b", "", words)
            assert re.search("[a-z]{3}", said), f"{command} {action}: {words}"


@pytest.mark.slow
def test_doctor_needs_no_megatron() -> None:
    done = run_python(
        "import sys; from megatron_vico.cli.main import main; status = main(['doctor'])\n"
        "assert 'megatron.core' not in sys.modules; sys.exit(status)"
    )
    names = "torch megatron-core CUDA NCCL gloo transformer-engine flash-attn apex"
    assert all(f" {name} " in done.stdout for name in names.split())
