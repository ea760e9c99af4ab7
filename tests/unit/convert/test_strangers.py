"""Nothing of a stranger's runs or travels: pickles of checkpoints, code beside weights."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_vico.checkpoint.training_checkpoint import load_weights
from megatron_vico.config.registry import get_model_config
from megatron_vico.convert.convert import convert
from megatron_vico.data.encode.tokenizer import load_tokenizer
from megatron_vico.errors import CheckpointError
from tests.toy_models import make_encoder, make_language_model
from tests.unit.convert.folders import MakeFolder
from tests.unit.convert.test_damage import COMMANDS, change_json


class Payload:
    """What a stranger's pickle runs: it leaves a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def with_metadata(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def act(step: Path) -> None:
        metadata = pickle.loads((step / ".metadata").read_bytes())
        change(metadata)
        (step / ".metadata").write_bytes(pickle.dumps(metadata))

    return act


def into_metadata(step: Path) -> None:
    with_metadata(lambda own: setattr(own, "planner_data", Payload(step / "ran")))(step)


def into_an_object(step: Path, *, key: str = "x_extra_state", nested: bool = False) -> None:
    content: Any = Payload(step / "ran")
    if nested:  # TransformerEngine's form
        content = torch.frombuffer(bytearray(pickle.dumps(content)), dtype=torch.uint8)
    torch.save([content], step / "object.distcp")

    def add(metadata: Any) -> None:
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        size = (step / "object.distcp").stat().st_size
        metadata.storage_data[MetadataIndex(key)] = _StorageInfo("object.distcp", 0, size)

    with_metadata(add)(step)


def move_first(path: Any) -> Callable[[Path], object]:
    def change(metadata: Any) -> None:
        index, place = next(iter(metadata.storage_data.items()))
        metadata.storage_data[index] = replace(place, relative_path=path)

    return with_metadata(change)


def load_to_train(source: Path, out: Path) -> None:
    model = get_model_config("toy-6b")
    modules = {"encoder": make_encoder(model), "language_model": make_language_model(model)}
    load_weights(source, modules=modules, model_size="toy-6b")


READERS = {
    "convert": COMMANDS["convert to internvl"],
    "inspect": COMMANDS["inspect"],
    "train": load_to_train,
}
MEGATRON: dict[str, tuple[Callable[[Path], object], str, tuple[str, ...]]] = {
    "no pickle": (
        lambda step: (step / ".metadata").write_bytes(b"no pickle"),
        r"\.metadata, not a readable checkpoint",
        tuple(READERS),
    ),
    "no metadata": (
        lambda step: (step / ".metadata").unlink(),
        r"\.metadata, not a readable checkpoint: .*No such file",
        tuple(READERS),
    ),
    "another object": (
        lambda step: (step / ".metadata").write_bytes(pickle.dumps({"a": 1})),
        "it holds dict",
        tuple(READERS),
    ),
    "code in .metadata": (into_metadata, r"names posix\.mkdir, which does not", tuple(READERS)),
    "file elsewhere": (
        move_first("../iter_0000000/__0_0.distcp"),
        "is no file of the folder",
        tuple(READERS),
    ),
    "no file name": (move_first(7), "7 is no file of the folder", tuple(READERS)),
    "code in an object": (into_an_object, r"object 'x_extra_state'.* posix\.mkdir", ("train",)),
    "code in extra state": (
        partial(into_an_object, nested=True),
        r"object 'x_extra_state'.* posix\.mkdir",
        ("train",),
    ),
    "code in common.pt": (
        lambda step: torch.save(Payload(step / "ran"), step / "common.pt"),
        r"common\.pt.* names posix\.mkdir",
        ("train",),
    ),
    "metadata.json": (
        lambda step: (step / "metadata.json").write_text("[]"),
        r"metadata\.json holds list",
        ("train",),
    ),
    "metadata.json without": (
        lambda step: (step / "metadata.json").write_text("{}"),
        r"metadata\.json names no sharded_backend",
        ("train",),
    ),
    "checkpoint.json": (
        lambda step: (step / "checkpoint.json").write_text('{"format_version": 1}'),
        r"checkpoint\.json is not a checkpoint's metadata",
        tuple(READERS),
    ),
}
"""What is done to a step's folder, what is said of it, and by whom: others read tensors only."""


@pytest.mark.parametrize(
    ("damage", "reader"), [(name, each) for name in MEGATRON for each in MEGATRON[name][2]]
)
def test_nothing_of_a_strangers_checkpoint_runs(
    damage: str, reader: str, folder_of: MakeFolder, tmp_path: Path
) -> None:
    run = shutil.copytree(folder_of("toy-6b", "megatron"), tmp_path / "run")
    act, message, _ = MEGATRON[damage]
    (run / "iter_0000000" / "checksums.json").unlink()
    act(run / "iter_0000000")
    before = sorted(run.rglob("*"))
    with pytest.raises(CheckpointError, match=message):
        READERS[reader](run, tmp_path / "out")
    assert sorted(run.rglob("*")) == before, "it ran"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_undamaged_checkpoint_is_loaded_to_train(folder_of: MakeFolder, tmp_path: Path) -> None:
    load_to_train(folder_of("toy-6b", "megatron"), tmp_path)


def test_companions_of_a_stranger(folder_of: MakeFolder, tmp_path: Path) -> None:
    """Names of code stay behind."""
    source = shutil.copytree(folder_of("toy-6b"), tmp_path / "source")
    code = {"auto_map": {"AutoTokenizer": ["tokenizer.Own", None]}, "custom_pipelines": {}}
    names = ("tokenizer_config.json", "generation_config.json", "preprocessor_config.json")
    for name in names:
        change_json(name, **code)(source)
    (source / "tokenizer.py").write_text("raise SystemExit")
    out = convert(source, output=tmp_path / "run", layout="megatron")
    for folder in (out / "tokenizer", convert(out, output=tmp_path / "flash", layout="flash")):
        for name in names:
            assert not code.keys() & json.loads((folder / name).read_text()).keys()
        assert not (folder / "tokenizer.py").exists()
    assert load_tokenizer(tmp_path / "flash").fingerprint == load_tokenizer(source).fingerprint
