"""Conversions by several processes: the same bits as by one, loaded under every kind of layout and brought back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_vico.checkpoint.convert import ConversionOptions, convert, export_hf
from megatron_vico.checkpoint.dcp_reader import open_dcp
from megatron_vico.checkpoint.state import find_iteration
from megatron_vico.models.registry import get_model_config
from tests.distributed.launch import launch, start
from tests.toy_models import make_encoder, make_language_model

LOADED_UNDER = {
    "toy-6b": ("tp2", "pp2", "tp2-pp2"),
    "toy-moe": ("ep2", "ep2-tp2"),
}
PAIRS = [(size, layout) for size, layouts in LOADED_UNDER.items() for layout in layouts]
MAX_SHARD_BYTES = 50_000
"""Small, so that toys make several files and each process has some to write."""

CONVERT = "../../tools/checkpoint/convert.py"


def read_all(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, single_process_groups: None) -> Path:
    """What tests/distributed/run_streamed.py made of random weights with four ranks."""
    path = tmp_path_factory.mktemp("streamed")
    for size in LOADED_UNDER:
        model = get_model_config(size)
        encoder, language_model = make_encoder(model), make_language_model(model)
        export_hf(path / size, encoder=encoder, language_model=language_model, model=model, layout="flash")
    launch("run_streamed.py", path, num_processes=4)
    return path


@pytest.mark.parametrize(("size", "layout"), PAIRS)
def test_loaded_and_saved_under_a_layout_and_back(size: str, layout: str, folder: Path, tmp_path: Path) -> None:
    convert(folder / f"{size}-{layout}", output=tmp_path / "back", layout="flash")
    assert same(read_all(tmp_path / "back"), read_all(folder / size))


@pytest.mark.parametrize("size", LOADED_UNDER)
def test_four_processes_write_what_one_writes(size: str, folder: Path, tmp_path: Path) -> None:
    convert(folder / size, output=tmp_path / "one", layout="megatron")
    one, four = (open_dcp(find_iteration(each)) for each in (tmp_path / "one", folder / f"{size}-megatron"))
    writers = {path.name.split("_")[2] for path in four.path.glob("*.distcp")}
    assert len(writers) == 4, "every process had a share"
    assert same({name: four.read(name) for name in four.tensors}, {name: one.read(name) for name in one.tensors})
    metadata = [each.metadata.state_dict_metadata for each in (one, four)]
    assert metadata[0].keys() == metadata[1].keys()


def test_two_processes_write_the_files_that_one_writes(folder: Path, tmp_path: Path) -> None:
    """By the command, as torchrun starts it; file by file, byte for byte."""
    words = (*("--from", "hf", "--to", "hf", "--layout", "internvl", "--verify"), "--input", folder / "toy-6b")
    words = (*words, "--max-shard-bytes", str(MAX_SHARD_BYTES))
    told = launch(CONVERT, *words, "--output", tmp_path / "two", num_processes=2)
    assert told.strip() == str(tmp_path / "two")  # said once
    options = ConversionOptions(max_shard_bytes=MAX_SHARD_BYTES)
    convert(folder / "toy-6b", output=tmp_path / "one", layout="internvl", options=options)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / each).iterdir()} for each in ("one", "two"))
    assert len([name for name in one if name.endswith(".safetensors")]) > 2
    assert one == two


def test_two_processes_end_together_where_one_file_is_broken(folder: Path, tmp_path: Path) -> None:
    options = ConversionOptions(max_shard_bytes=MAX_SHARD_BYTES)
    source = convert(folder / "toy-6b", output=tmp_path / "source", layout="hf", options=options)
    last = sorted(source.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    words = ("--from", "hf", "--to", "megatron", "--input", source, "--output", tmp_path / "out")
    done = start(CONVERT, *words, num_processes=2, timeout_s=120)
    assert done.returncode != 0
    assert f"{last} has " in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
