"""Damage x command: a run's folder that something has happened to, given to all that read it. Each
says what is wrong in one line and changes nothing."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vico.cli.main import main
from tests.training_runs import ToyData

POINTER = "latest_checkpointed_iteration.txt"
STEP = "iter_0000002"


def largest(run: Path) -> Path:
    return max((run / STEP).glob("*.distcp"), key=lambda path: path.stat().st_size)


def flip(run: Path) -> None:
    contents = bytearray(largest(run).read_bytes())
    contents[len(contents) // 2] ^= 1
    largest(run).write_bytes(contents)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


READERS = ("resume", "start from", "convert", "generate", "evaluate")
"""Those that take weights."""

DAMAGE: dict[str, tuple[Callable[[Path], object], str, tuple[str, ...]]] = {
    # What happens, what is said of it, and by whom; the others have no need of what is damaged.
    "flipped bit": (flip, r"damaged:?\s+\S+ differs from its checksum", (*READERS, "verify")),
    "cut weights": (
        lambda run: cut(largest(run)),
        r"cut short; copy|damaged: \S+ has \d+ bytes, \d+ were written|has \d+ bytes, \d+ were",
        (*READERS, "verify", "inspect"),
    ),
    "absent weights": (
        lambda run: largest(run).unlink(),
        r"is absent|lacks \S+, which its .metadata names",
        (*READERS, "verify", "inspect"),
    ),
    "broken description": (
        lambda run: cut(run / STEP / "checkpoint.json"),
        r"checkpoint.json (is not valid JSON|has \d+ bytes)",
        (*READERS, "verify", "inspect"),
    ),
    "pipe for weights": (
        lambda run: pipe(largest(run)),
        r"cut short; copy|has 0 bytes, \d+ were|is absent|lacks \S+, which its .metadata names",
        (*READERS, "verify", "inspect"),
    ),
    "pipe for metadata": (
        lambda run: pipe(run / STEP / ".metadata"),
        r"\.metadata has 0 bytes|\.metadata, not a readable .* not a plain file",
        (*READERS, "verify", "inspect"),
    ),
    "pipe for description": (
        lambda run: pipe(run / STEP / "checkpoint.json"),
        rf"{STEP} is no finished checkpoint|checkpoint.json has 0 bytes",
        (*READERS, "verify", "inspect", "status"),
    ),
    "pipe for pointer": (
        lambda run: pipe(run / POINTER),
        rf"finished checkpoints \({STEP}\) but no {POINTER}.*`echo 2 > ",
        (*READERS, "inspect", "status"),
    ),
    "another learning rate": (
        lambda run: None,  # the command's is not the run's
        r"max_lr is 0\.001 in it, \S+ here, .* the learning rates .* from its weights\.\n$",
        ("resume",),
    ),
    "broken checksums": (
        lambda run: cut(run / STEP / "checksums.json"),
        r"checksums.json is not valid JSON",
        (*READERS, "verify"),
    ),
    "no pointer": (
        lambda run: (run / POINTER).unlink(),
        rf"finished checkpoints \({STEP}\) but no {POINTER}.*`echo 2 > ",
        (*READERS, "inspect", "status"),
    ),
    "broken pointer": (
        lambda run: (run / POINTER).write_bytes(b"\0\0\0\0"),
        rf"{POINTER} holds .*, expected a step, one of those finished: {STEP}; `echo 2 > ",
        (*READERS, "inspect", "status"),
    ),
    "absent step": (
        lambda run: (run / STEP).rename(run / "iter_0000001"),
        rf"{STEP} is no finished checkpoint; finished here: iter_0000001; `echo 1 > ",
        (*READERS, "inspect", "status"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_every_command_says_what_is_wrong(
    damage: str,
    toy_data: ToyData,
    base_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, new = shutil.copytree(base_checkpoint, tmp_path / "run"), tmp_path / "new"
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "yes"}]
    row = {"id": "a", "conversations": turns, "metrics": ["exact"]}
    (tmp_path / "set.jsonl").write_text(json.dumps(row) + "\n")
    data = f"--data-path {toy_data.shards} --tokenizer-model {toy_data.tokenizer} --num-workers 0"
    train = f"train --stage pretrain {data} --max-dynamic-patch 4 --train-iters 3"
    model = f"--load {run} --tokenizer-model {toy_data.tokenizer} --plan none --max-new-tokens 1"
    commands = {
        "resume": f"{train} --save {run} --load {run}",
        "start from": f"{train} --save {new} --pretrained-checkpoint {run}",
        "convert": f"convert --from megatron --to hf --layout hf --input {run} --output {new}",
        "generate": f"generate {model} --prompt ?",
        "evaluate": f"evaluate {model} --jsonl {tmp_path / 'set.jsonl'} --output {new}",
        "verify": f"checkpoint verify {run}",
        "inspect": f"checkpoint inspect {run}",
        "status": f"status --stage pretrain --train-iters 2 --save {run}",
    }
    act, message, concerned = DAMAGE[damage]
    act(run)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in concerned:
        status = main(commands[name].split())
        told = capsys.readouterr()
        assert status == (1 if name == "verify" and not told.err else 2), (name, told)
        assert re.search(message, told.err + told.out), (name, told)
        assert told.err.count("Error: ") <= 1, (name, told)
        assert "Traceback" not in told.err, (name, told)
        shutil.rmtree(new, ignore_errors=True)  # made, and empty
        after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert after == before, name
    for name in commands.keys() - concerned - {"resume", "start from", "generate", "evaluate"}:
        assert main(commands[name].split()) == 0, (name, capsys.readouterr())
