"""Safetensors folders: there and back, in shards, and every way they can be broken."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_vico.convert.huggingface import safetensors_folder
from megatron_vico.errors import CheckpointError


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "first": torch.randn(4, 3, generator=generator),
        "second": torch.randn(7, generator=generator).bfloat16(),
        "a.third": torch.arange(5),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
    }


@pytest.mark.parametrize("max_shard_bytes", [10**9, 60, 1])
def test_there_and_back(max_shard_bytes: int, tmp_path: Path) -> None:
    tensors = some_tensors()
    safetensors_folder.write_folder(
        tmp_path, tensors=tensors.items(), max_shard_bytes=max_shard_bytes
    )
    folder = safetensors_folder.open_folder(tmp_path)
    assert folder.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert folder.tensors[name].shape == tensor.shape
        found = folder.read(name)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


def test_one_file_has_no_index_and_several_have_one(tmp_path: Path) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    one.mkdir(), several.mkdir()
    safetensors_folder.write_folder(one, tensors=some_tensors().items())
    safetensors_folder.write_folder(several, tensors=some_tensors().items(), max_shard_bytes=60)
    assert [path.name for path in one.iterdir()] == ["model.safetensors"]
    index = json.loads((several / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in some_tensors().values())
    shards = sorted(path.name for path in several.glob("*.safetensors"))
    assert shards == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    assert len(shards) > 1
    found = {name: shard for shard in shards for name in load_file(several / shard)}
    assert index["weight_map"] == found


def test_views_are_written_whole(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    views = {"left": whole[:, :3], "top": whole[:2], "bottom": whole[2:], "turned": whole.t()}
    safetensors_folder.write_folder(tmp_path, tensors=views.items())
    folder = safetensors_folder.open_folder(tmp_path)
    assert all(torch.equal(folder.read(name), tensor) for name, tensor in views.items())


def broken_folder(path: Path) -> Path:
    safetensors_folder.write_folder(path, tensors=some_tensors().items(), max_shard_bytes=60)
    return path


def test_missing_shard(tmp_path: Path) -> None:
    folder = broken_folder(tmp_path)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"index\.json names model-00001-of-00002\.safetensors, absent"
    ):
        safetensors_folder.open_folder(folder)


@pytest.mark.parametrize("keep", [-1, 40, 8, 3, 0])
def test_file_cut_short(keep: int, tmp_path: Path) -> None:
    folder = broken_folder(tmp_path)
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors"):
        safetensors_folder.open_folder(folder)


def test_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0" + b"PK not a header!")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        safetensors_folder.open_folder(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([1], "its header is no table"),
        ({"a": 3}, "'a' has the entry 3"),
        ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "none of safetensors"),
        ({"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}, "none of safetensors"),
        ({"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, "none of safetensors"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, "none of safetensors"),
        ({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}}, "format F4; known are"),
        (
            {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
            "in 8 bytes, which does not fit",
        ),
        (
            {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "ab"},
            "no tensor or to two",
        ),
    ],
)
def test_headers_that_say_nonsense(header: object, message: str, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match=message):
        safetensors_folder.open_folder(tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    folder = broken_folder(tmp_path)
    save_file({"second": torch.ones(7)}, folder / "model-00003-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    contents = json.loads(index.read_text())
    contents["weight_map"]["second"] = "model-00003-of-00002.safetensors"
    index.write_text(json.dumps(contents))
    with pytest.raises(CheckpointError, match=r"00003\S* holds tensors that .* too: second"):
        safetensors_folder.open_folder(folder)


def test_two_sets_of_weights(tmp_path: Path) -> None:
    """transformers would take the single file."""
    folder = broken_folder(tmp_path)
    save_file({"first": torch.ones(4, 3)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="two sets of weights"):
        safetensors_folder.open_folder(folder)


@pytest.mark.parametrize(
    "weight_map", [None, ["first"], {"first": 1}, {"first": "../model.safetensors"}]
)
def test_index_that_is_none(weight_map: object, tmp_path: Path) -> None:
    folder = broken_folder(tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="weight_map is no table"):
        safetensors_folder.open_folder(folder)


def test_index_that_promises_too_much(tmp_path: Path) -> None:
    folder = broken_folder(tmp_path)
    index = folder / "model.safetensors.index.json"
    contents = json.loads(index.read_text())
    contents["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(contents))
    with pytest.raises(CheckpointError, match="ghost"):
        safetensors_folder.open_folder(folder)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        safetensors_folder.open_folder(folder)


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors folder"):
        safetensors_folder.open_folder(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        safetensors_folder.open_folder(tmp_path / "absent")


def test_new_folder_appears_when_finished(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "export"
    with safetensors_folder.new_folder(target) as folder:
        (folder / "file").write_text("x")
        assert not target.exists()
        with pytest.raises(CheckpointError, match="never finished"):
            safetensors_folder.open_folder(folder)
    assert (target / "file").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["export"]


def test_new_folder_never_replaces_anything(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(CheckpointError, match="exists already"),
        safetensors_folder.new_folder(tmp_path),
    ):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_new_folder_where_a_link_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To another disk, most often: the unfinished folder has to be there too. And `.` has no name
    of its own."""
    real = tmp_path / "disk" / "real"
    real.mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    with safetensors_folder.new_folder(tmp_path / "link") as folder:
        (folder / "file").write_text("x")
        assert folder.parent == real.parent
    assert (real / "file").read_text() == "x"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with safetensors_folder.new_folder(".") as folder:
        (folder / "file").write_text("y")
    assert (tmp_path / "here" / "file").read_text() == "y"


def test_a_mount_point_is_no_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would refuse the renaming, after all has been written."""
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path / "volume")
    (tmp_path / "volume").mkdir()
    with (
        pytest.raises(CheckpointError, match="is a mount point"),
        safetensors_folder.new_folder(tmp_path / "volume"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_failed_writer_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_half(tmp_path / "export", error)
    assert not list(tmp_path.iterdir())


def write_half(path: Path, error: BaseException) -> None:
    with safetensors_folder.new_folder(path) as folder:
        (folder / "file").write_text("half")
        raise error


def test_writer_that_was_killed_can_start_over(tmp_path: Path) -> None:
    left = tmp_path / "export.incomplete"
    left.mkdir()
    (left / "half").write_text("")
    with safetensors_folder.new_folder(tmp_path / "export") as folder:
        assert not list(folder.iterdir())
    assert (tmp_path / "export").is_dir()
    assert not left.exists()


def test_files_that_travel_along(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir(), target.mkdir()
    for name in ("tokenizer.json", "merges.txt", "sentencepiece.model"):
        (source / name).write_text(name)
    (target / "merges.txt").write_text("kept")
    assert safetensors_folder.copy_files(source, target, safetensors_folder.TOKENIZER_FILES) == [
        "tokenizer.json",
        "sentencepiece.model",
    ]
    assert (target / "tokenizer.json").read_text() == "tokenizer.json"
    assert (target / "merges.txt").read_text() == "kept"


def test_foreign_files_are_read(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(
        tensors, tmp_path / "model.safetensors"
    )  # without the metadata that this project writes
    folder = safetensors_folder.open_folder(tmp_path)
    assert all(torch.equal(folder.read(name), tensor) for name, tensor in tensors.items())
