"""Safetensors folders: there and back, in shards, as the library reads and writes them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vico.convert.huggingface.safetensors_folder import (
    open_folder,
    plan_shards,
    write_index,
    write_shard,
)
from megatron_vico.convert.source import TensorInfo
from megatron_vico.errors import CheckpointError
from tests.tensor_files import read_all, same
from tests.unit.convert.folders import Tensors


def some_tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    whole = torch.arange(24.0).view(4, 6)
    return {
        "first": torch.randn(4, 3, generator=generator),
        "second": torch.randn(7, generator=generator).bfloat16(),
        "a.third": torch.arange(5),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
        # Views of one memory are written whole.
        "left": whole[:, :3],
        "turned": whole.t(),
    }


def write(folder: Path, tensors: Tensors, *, max_shard_bytes: int) -> None:
    groups = [
        {name: TensorInfo(shape=tuple(each.shape), dtype=each.dtype)}
        for name, each in tensors.items()
    ]
    shards = plan_shards(groups, max_shard_bytes=max_shard_bytes)
    for shard in shards:
        write_shard(
            folder,
            shard,
            make=lambda group: [tensors[name] for name in group],
            written=lambda num_bytes: None,
        )
    write_index(folder, shards)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 60, 1])
def test_there_and_back(max_shard_bytes: int, tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path, tensors, max_shard_bytes=max_shard_bytes)
    folder = open_folder(tmp_path)
    assert same({name: folder.read_tensor(name) for name in folder.tensors}, tensors)
    assert same(read_all(tmp_path), tensors), "the library reads what is written here"
    for name, tensor in tensors.items():
        assert folder.tensors[name].shape == tuple(tensor.shape)
        assert folder.tensors[name].num_bytes == tensor.nbytes
    if max_shard_bytes == 10**9:
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
        return
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in tensors.values())
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    count = len(shards)
    assert count > 1
    assert shards == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert index["weight_map"] == {
        name: shard for shard in shards for name in load_file(tmp_path / shard)
    }


def test_foreign_files_are_read(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in some_tensors().items()}
    save_file(tensors, tmp_path / "model.safetensors")  # without this project's metadata
    folder = open_folder(tmp_path)
    assert same({name: folder.read_tensor(name) for name in tensors}, tensors)


@pytest.mark.parametrize("keep", [-1, 40, 8, 3, 0])
def test_file_cut_short(keep: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"first": torch.ones(4, 3)}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors \(\d+ bytes\) is cut short or"):
        open_folder(tmp_path)
    file.write_bytes(whole)
    folder = open_folder(tmp_path)
    file.write_bytes(whole[:keep])  # after it was opened
    with pytest.raises(CheckpointError, match=r"could not read 'first' from .*: .*copy it again"):
        folder.read_tensor("first")


@pytest.mark.parametrize(
    "header",
    [
        [1],
        {"a": 3},
        {"a": {"shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"},
    ],
)
def test_headers_that_say_nonsense(header: object, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match=r"not a safetensors file: .*; copy it again"):
        open_folder(tmp_path)


def test_a_format_that_torch_has_not(tmp_path: Path) -> None:
    text = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match=r"tensor 'a' has format F8_E8M0; known are F64,"):
        open_folder(tmp_path)
