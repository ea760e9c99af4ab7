"""Damage x command: every small file that a command reads, in every way in which it can be none.

Each is refused in one line that names the file, with status 2, and nothing is changed. What is
wrong inside a file of the right kind is in the tables of runs, conversions and shards.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vico.cli.main import main
from megatron_vico.config.registry import get_model_config
from megatron_vico.data.encode.tokenizer import load_tokenizer
from tests.folder_state import state_of
from tests.hf_exports import export_hf
from tests.toy_models import make_encoder, make_language_model
from tests.training_runs import ToyData

KINDS: dict[str, Callable[[Path], object]] = {
    "absent": lambda path: None,
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "empty": Path.touch,
    "utf-16": lambda path: path.write_text('{"a": 1}', encoding="utf-16"),
    "zeros": lambda path: path.write_bytes(bytes(64)),
    "nested": lambda path: path.write_text("[" * 10_000),
    "list": lambda path: path.write_text("[[1]]"),
    "digits": lambda path: path.write_text("9" * 5000),
    "number": lambda path: path.write_text("7"),
}

DATA = "--tokenizer-model {0}/tokenizer.model --model-size toy"
MODEL = "--load {0}/flash --plan none --max-new-tokens 1"
COMMANDS = {
    "convert": "convert --from hf --to megatron --input {0}/flash --output {0}/out",
    "inspect": "checkpoint inspect {0}/flash",
    "generate": f"generate {MODEL} --prompt ?",
    "evaluate": f"evaluate {MODEL} --jsonl {{0}}/set.jsonl",
    "replay": "generate --load {0}/flash --plan replay --replay {0}/log.jsonl --prompt ?",
    "shards inspect": "shards inspect {0}/shards",
    "mixture": "shards inspect {0}/mixture.json",
    "make": f"shards make --meta {{0}}/meta.json --out {{0}}/out {DATA}",
    "check": "train --check files --stage pretrain --max-dynamic-patch 4 --seq-length 600"
    f" --data-path {{0}}/shards {DATA}",
    "print": "train --recipe {0}/recipe.yaml --print-config",
    "status": "status --recipe {0}/recipe.yaml",
    "plan": "plan --recipe {0}/recipe.yaml",
    "plot table": "plot table {0}/results.json",
    "plot content": "plot content {0}/results.json --output {0}/x.png",
    "plot bubble": "plot bubble {0}/results.json --output {0}/x.png",
    "plot loss": "plot loss {0}/metrics.jsonl --output {0}/x.png",
    "report": "report {0}/metrics.jsonl --out {0}/x.html",
}
COMPANIONS = ("generation_config.json", "preprocessor_config.json")
OF_MODEL = ("convert", "inspect", "generate")
READERS = {
    "flash/config.json": OF_MODEL,
    "flash/model.safetensors": OF_MODEL,
    "flash/tokenizer.json": ("convert", "generate"),
    "flash/tokenizer_config.json": ("convert",),
    **{f"flash/{name}": ("convert", "generate") for name in COMPANIONS},
    "shards/index.json": ("shards inspect", "check"),
    "shards/shard-000000.npz": ("shards inspect", "check"),
    "tokenizer.model": ("make", "check"),
    "mixture.json": ("mixture",),
    "meta.json": ("make",),
    "set.jsonl": ("evaluate",),
    "log.jsonl": ("replay",),
    "recipe.yaml": ("print", "status", "plan"),
    "results.json": ("plot table", "plot content", "plot bubble"),
    "metrics.jsonl": ("plot loss", "report"),
}
OPTIONAL = ("tokenizer.json", "tokenizer_config.json", *COMPANIONS)
"""A model's folder may be without."""
EMPTY_RECIPE = ("empty", "recipe.yaml")


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, toy_data: ToyData, single_process_groups: None
) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    model = get_model_config("toy")
    modules = {"encoder": make_encoder(model), "language_model": make_language_model(model)}
    tokenizer = load_tokenizer(toy_data.tokenizer)
    export_hf(folder / "flash", **modules, model=model, layout="flash", tokenizer=tokenizer)  # type: ignore[arg-type]
    (folder / "flash" / "checksums.json").unlink()
    shutil.copytree(toy_data.shards, folder / "shards")
    shutil.copy(toy_data.tokenizer, folder / "tokenizer.model")
    return folder


@pytest.mark.parametrize(("file", "command"), [(f, c) for f in READERS for c in READERS[f]])
def test_every_command_names_the_file(
    file: str, command: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, make in KINDS.items():
        if (kind == "absent" and Path(file).name in OPTIONAL) or (kind, file) == EMPTY_RECIPE:
            continue
        folder = shutil.copytree(whole, tmp_path / kind, copy_function=os.link)
        path = folder / file
        path.unlink(missing_ok=True)
        make(path)
        before = state_of(folder)
        status = main(COMMANDS[command].format(folder).split())
        told = capsys.readouterr()
        assert (status, told.err.count("Error: ")) == (2, 1), (kind, told)
        last = told.err.splitlines()[-1]
        assert re.match(r"\w+Error: ", last), (kind, told)
        assert path.name in last or (kind == "absent" and path.parent.name in last), (kind, told)
        assert state_of(folder) == before, kind
