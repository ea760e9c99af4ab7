"""Conversions by several processes: the same bits as by one, loaded under every kind of layout and
brought back."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_vico.checkpoint.training_checkpoint import find_iteration
from megatron_vico.config.registry import MODELS, get_model_config
from megatron_vico.convert.convert import convert
from megatron_vico.convert.megatron.reader import open_dcp
from megatron_vico.convert.options import ConversionOptions
from tests.distributed.launch import on_ranks, torchrun
from tests.distributed.streamed_ranks import (
    LOADED_UNDER,
    MAX_SHARD_BYTES,
    load_and_save,
    odd_models,
    told_of_a_conversion,
)
from tests.hf_exports import export_hf
from tests.tensor_files import read_all, same
from tests.toy_models import make_encoder, make_language_model

PAIRS = [(size, layout) for size, layouts in LOADED_UNDER.items() for layout in layouts]
CONVERT = "tools/checkpoint/convert.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, single_process_groups: None) -> Iterator[Path]:
    """What tests/distributed/streamed_ranks.py made of random weights with four ranks."""
    path = tmp_path_factory.mktemp("streamed")
    MODELS.update(odd_models())
    for size in LOADED_UNDER:
        model = get_model_config(size)
        encoder, language_model = make_encoder(model), make_language_model(model)
        export_hf(
            path / size, encoder=encoder, language_model=language_model, model=model, layout="flash"
        )
    convert(path / "toy-6b", output=path / "base", layout="hf")
    on_ranks(load_and_save, path, num_ranks=4)
    yield path
    for size in odd_models():
        del MODELS[size]


@pytest.mark.parametrize(("size", "layout"), PAIRS)
def test_loaded_and_saved_under_a_layout_and_back(
    size: str, layout: str, folder: Path, tmp_path: Path
) -> None:
    """In the one layout that has every tensor; tests/unit/convert has the others."""
    convert(folder / f"{size}-{layout}", output=tmp_path / "back", layout="flash")
    assert same(read_all(tmp_path / "back"), read_all(folder / size))


def test_a_vico_start_does_not_depend_on_the_number_of_processes(
    folder: Path, tmp_path: Path
) -> None:
    convert(folder / "base", output=tmp_path / "start", layout="megatron")
    for source, name in ((folder, "four"), (tmp_path, "one")):
        convert(source / "start", output=tmp_path / f"{name}-flash", layout="flash")
    one, four = (read_all(tmp_path / f"{name}-flash") for name in ("one", "four"))
    assert same(four, one)
    assert not torch.equal(
        four["mlp2.1.weight"], read_all(folder / "toy-6b")["mlp2.1.weight"]
    )  # fresh, not loaded


@pytest.mark.parametrize("size", LOADED_UNDER)
def test_four_processes_write_what_one_writes(size: str, folder: Path, tmp_path: Path) -> None:
    convert(folder / size, output=tmp_path / "one", layout="megatron")
    one, four = (
        open_dcp(find_iteration(each)) for each in (tmp_path / "one", folder / f"{size}-megatron")
    )
    writers = {path.name.split("_")[2] for path in four.path.glob("*.distcp")}
    assert len(writers) == 4, "every process had a share"
    assert same(
        {name: four.read_tensor(name) for name in four.tensors},
        {name: one.read_tensor(name) for name in one.tensors},
    )
    metadata = [each.metadata.state_dict_metadata for each in (one, four)]
    assert metadata[0].keys() == metadata[1].keys()


def test_two_processes_write_the_files_that_one_writes(folder: Path, tmp_path: Path) -> None:
    """By the command, as torchrun starts it; file by file, byte for byte."""
    words = (
        *("--from", "hf", "--to", "hf", "--layout", "internvl", "--verify"),
        "--input",
        folder / "toy-6b",
    )
    words = (*words, "--max-shard-bytes", str(MAX_SHARD_BYTES))
    done = torchrun(CONVERT, *words, "--output", tmp_path / "two", num_processes=2)
    assert done.stdout.strip() == str(tmp_path / "two"), done.stderr  # said once
    options = ConversionOptions(max_shard_bytes=MAX_SHARD_BYTES)
    convert(folder / "toy-6b", output=tmp_path / "one", layout="internvl", options=options)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / each).iterdir()}
        for each in ("one", "two")
    )
    assert len([name for name in one if name.endswith(".safetensors")]) > 2
    assert one == two


def test_two_processes_end_together_where_one_file_is_broken(folder: Path, tmp_path: Path) -> None:
    options = ConversionOptions(max_shard_bytes=MAX_SHARD_BYTES)
    source = convert(folder / "toy-6b", output=tmp_path / "source", layout="hf", options=options)
    last = sorted(source.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    for told in on_ranks(told_of_a_conversion, source, tmp_path / "out", num_ranks=2):
        assert f"{last} (" in told
        assert "is cut short" in told
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
