"""A conversion tensor by tensor: it writes what training writes, and what goes wrong leaves nothing
to trust."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_vico.checkpoint import training_checkpoint
from megatron_vico.config.registry import get_model_config
from megatron_vico.convert import convert as conversion
from megatron_vico.convert.convert import ConversionOptions, convert, export_hf
from megatron_vico.convert.huggingface import safetensors_folder
from megatron_vico.convert.megatron.reader import open_dcp
from megatron_vico.convert.names.internvl import Layout
from megatron_vico.convert.ranks import Ranks, launched
from megatron_vico.convert.source import Source, hf_source
from megatron_vico.errors import CheckpointError
from tests.peak_bytes import PeakBytes
from tests.tensor_files import read_all, same_bits
from tests.toy_models import make_encoder, make_language_model

TOYS = ("toy", "toy-6b", "toy-moe")
SMALL = ConversionOptions(max_shard_bytes=100_000)
"""So that toys make several files."""


class Make(Protocol):
    """Gives a toy's folder in some layout."""

    def __call__(self, size: str, layout: Layout = "flash") -> Path: ...


@pytest.fixture(scope="module")
def flash(tmp_path_factory: pytest.TempPathFactory, single_process_groups: None) -> Make:
    """A toy with random weights as a Flash folder, made once."""
    root = tmp_path_factory.mktemp("flash")

    def make(size: str, layout: Layout = "flash") -> Path:
        folder = root / f"{size}-{layout}"
        if not folder.exists():
            model = get_model_config(size)
            encoder, language_model = make_encoder(model), make_language_model(model)
            export_hf(
                folder, encoder=encoder, language_model=language_model, model=model, layout=layout
            )
        return folder

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", TOYS)
def test_the_same_as_training_saves(
    size: str, dtype: torch.dtype, tmp_path: Path, single_process_groups: None
) -> None:
    """Keys, shapes, number formats, cuts, objects that are no tensors, and every bit."""
    model = get_model_config(size)
    modules = {
        "encoder": make_encoder(model).to(dtype),
        "language_model": make_language_model(model).to(dtype),
    }
    metadata = training_checkpoint.CheckpointMetadata(model_size=size, stage="pretrain")
    saved = training_checkpoint.save_checkpoint(
        tmp_path / "saved", 0, modules=modules, metadata=metadata
    )
    files = tmp_path / "files"
    export_hf(files, **modules, model=model, layout="flash")  # type: ignore[arg-type]
    streamed = training_checkpoint.find_iteration(
        convert(files, output=tmp_path / "streamed", layout="megatron")
    )
    one, other = (
        FileSystemReader(each).read_metadata().state_dict_metadata for each in (saved, streamed)
    )
    assert one.keys() == other.keys()
    for key, expected in one.items():
        found = other[key]
        assert type(found) is type(expected), key
        if isinstance(expected, TensorStorageMetadata):
            assert isinstance(found, TensorStorageMetadata)
            assert (found.size, found.properties.dtype) == (
                expected.size,
                expected.properties.dtype,
            ), key
            cuts = [
                {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in each.chunks}
                for each in (expected, found)
            ]
            assert cuts[0] == cuts[1], key
    tensors, streamed_tensors = open_dcp(saved), open_dcp(streamed)
    for name in tensors.tensors:
        assert same_bits(tensors.read(name), streamed_tensors.read(name)), name
    fresh = {
        "encoder": make_encoder(model, seed=5).to(dtype),
        "language_model": make_language_model(model).to(dtype),
    }
    training_checkpoint.load_weights(tmp_path / "streamed", modules=fresh, model_size=size)
    for name, module in modules.items():
        loaded = fresh[name].state_dict()
        assert all(
            torch.equal(loaded[key], each)
            for key, each in module.state_dict().items()
            if each is not None
        )


def test_numbers_that_are_no_numbers_survive(flash: Make, tmp_path: Path) -> None:
    """Bits, not values: NaN with a payload, minus zero, and the smallest numbers there are."""
    source = tmp_path / "source"
    shutil.copytree(flash("toy-6b"), source)
    name = "mlp1.1.weight"
    stored = safetensors_folder.open_folder(source).tensors[name]
    strange = torch.tensor([0x7FC12345, 0x80000000, 1, 0x7F800000, 0xFF800000], dtype=torch.uint32)
    with stored.file.open("r+b") as stream:
        stream.seek(stored.start)
        stream.write(strange.numpy().tobytes())
    convert(
        source,
        output=tmp_path / "megatron",
        layout="megatron",
        options=ConversionOptions(verify="bits"),
    )
    convert(
        tmp_path / "megatron",
        output=tmp_path / "back",
        layout="flash",
        options=ConversionOptions(verify="bits"),
    )
    found = load_file(tmp_path / "back/model.safetensors")[name]
    assert torch.equal(found.view(torch.int32).flatten()[:5], strange.view(torch.int32))


def test_mixed_formats_survive(flash: Make, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = {
        name: tensor.bfloat16() if name.startswith("language_model.model.layers.1.") else tensor
        for name, tensor in load_file(flash("toy-6b") / "model.safetensors").items()
    }
    safetensors_folder.write_folder(source, tensors=tensors.items())
    shutil.copyfile(flash("toy-6b") / "config.json", source / "config.json")
    convert(source, output=tmp_path / "hf", layout="flash", options=replace(SMALL, verify="bits"))
    found = read_all(tmp_path / "hf")
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())
    # Megatron's form has one tensor for a weight of all layers, and so one format: nothing is
    # rounded unasked.
    names = r"layers\.0\.[\w.]+ is float32, [\w.]+layers\.1\.[\w.]+ is bfloat16"
    with pytest.raises(CheckpointError, match=rf"{names}; .* give --dtype \(fp32 loses nothing\)"):
        convert(source, output=tmp_path / "megatron", layout="megatron")
    convert(
        source,
        output=tmp_path / "megatron",
        layout="megatron",
        options=ConversionOptions(dtype="fp32"),
    )
    convert(tmp_path / "megatron", output=tmp_path / "back", layout="flash")
    back = read_all(tmp_path / "back")
    assert all(torch.equal(back[name], tensor.float()) for name, tensor in tensors.items())


def test_holds_a_tensor_at_a_time(flash: Make, tmp_path: Path) -> None:
    """Tensors alive at once, of a toy; tests/test_large_conversion.py measures the memory of the
    process."""
    sizes = [each.nbytes for each in load_file(flash("toy-6b") / "model.safetensors").values()]
    with PeakBytes() as there:
        convert(flash("toy-6b"), output=tmp_path / "megatron", layout="megatron")
    with PeakBytes() as back:
        convert(tmp_path / "megatron", output=tmp_path / "back", layout="flash")
    assert there.peak < 2.5 * max(sizes)  # measured 1.0
    assert back.peak < 2.5 * max(sizes)  # measured 2.0
    assert sum(sizes) > 5 * max(sizes), "holding everything would show"


@pytest.mark.parametrize("layout", ["megatron", "flash"])
def test_verify_finds_a_flipped_bit(
    layout: Layout, flash: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a disk that does not keep what it was given: one bit of the output changes before it
    is read back."""
    real = conversion.open_source

    def after_a_flip(path: Path, **words: str) -> Source:
        if Path(path) == tmp_path / "out":
            flip(tmp_path / "out")
        return real(path, **words)  # type: ignore[arg-type]

    monkeypatch.setattr(conversion, "open_source", after_a_flip)
    with pytest.raises(
        CheckpointError, match=r"out differs from .* in [\w.]+; it is now .*out\.incomplete"
    ):
        convert(
            flash("toy-6b"),
            output=tmp_path / "out",
            layout=layout,
            options=ConversionOptions(verify="bits"),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out.incomplete"]
    monkeypatch.undo()
    convert(
        flash("toy-6b"),
        output=tmp_path / "out",
        layout=layout,
        options=ConversionOptions(verify="bits"),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("layout", ["megatron", "flash"])
def test_verify_marks_what_it_cannot_read(
    layout: Layout, flash: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a disk that loses the end of a file."""
    real = conversion.open_source

    def after_a_cut(path: Path, **words: str) -> Source:
        if Path(path) == tmp_path / "out":
            largest = max((tmp_path / "out").rglob("*.*"), key=lambda each: each.stat().st_size)
            os.truncate(largest, largest.stat().st_size // 2)
        return real(path, **words)  # type: ignore[arg-type]

    monkeypatch.setattr(conversion, "open_source", after_a_cut)
    with pytest.raises(
        CheckpointError, match=r"out cannot be compared with .*; it is now .*out\.incomplete"
    ):
        convert(
            flash("toy-6b"),
            output=tmp_path / "out",
            layout=layout,
            options=ConversionOptions(verify="bits"),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out.incomplete"]


def flip(folder: Path) -> None:
    """Change the lowest bit of a number in the largest tensor's file, behind everything that
    describes the file."""
    path = max(
        (path for path in folder.rglob("*") if path.suffix in (".distcp", ".safetensors")),
        key=size_of,
    )
    contents = bytearray(path.read_bytes())
    if path.suffix == ".safetensors":
        position = len(contents) - 4
    else:  # a zip archive a tensor: 64 bytes into the largest one's numbers
        stored = FileSystemReader(path.parent).read_metadata().storage_data
        largest = max(
            (each for each in stored.values() if each.relative_path == path.name),
            key=lambda e: e.length,
        )
        position = largest.offset + largest.length // 2
    contents[position] ^= 1
    path.write_bytes(contents)


def size_of(path: Path) -> int:
    return path.stat().st_size


KILLED = """
import os, signal, sys
from megatron_vico import cpu_stand_in
cpu_stand_in.install()
from megatron_vico.convert import convert
from megatron_vico.convert.huggingface.safetensors_folder import open_folder, SafetensorsFolder
read, count = SafetensorsFolder.read, [0]
def read_some(self, name):
    count[0] += 1
    if count[0] == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, name)
SafetensorsFolder.read = read_some
convert.convert(sys.argv[1], output=sys.argv[2], layout=sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["megatron", "internvl"])
def test_killed_halfway(layout: Layout, flash: Make, tmp_path: Path) -> None:
    """What is left has another name, no reader takes it, and the next conversion starts over."""
    words = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        KILLED,
        str(flash("toy-6b")),
        str(tmp_path / "out"),
        layout,
    ]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": "."}
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = tmp_path / "out.incomplete"
    assert [path.name for path in tmp_path.iterdir()] == [left.name]
    assert any(path.suffix in (".distcp", ".safetensors") for path in left.rglob("*")), (
        "it was at work"
    )
    for read in (
        safetensors_folder.open_folder,
        training_checkpoint.find_iteration,
        training_checkpoint.read_metadata,
        conversion.open_source,
    ):
        with pytest.raises(CheckpointError, match="never finished"):
            read(left)
    with pytest.raises(CheckpointError, match="never finished"):
        convert(left, output=tmp_path / "again", layout="flash")
    convert(
        flash("toy-6b"),
        output=tmp_path / "out",
        layout=layout,
        options=ConversionOptions(verify="bits"),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("layout", ["megatron", "internvl"])
@pytest.mark.parametrize("fails", ["fsync", "space"])
def test_full_disk(
    fails: str, layout: Layout, flash: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = flash("toy-6b")

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def little(path: Path) -> shutil._ntuple_diskusage:
        return shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)

    if fails == "fsync":  # the disk fills up while it is written
        monkeypatch.setattr(os, "fsync", no_space)
        expected = r"could not write .*out: .*No space left on device; nothing is left of it"
    else:
        monkeypatch.setattr(shutil, "disk_usage", little)
        expected = r"out.* needs [\d.]+ GB, its disk has 0\.0 GB free; nothing was written"
    with pytest.raises(CheckpointError, match=expected):
        convert(source, output=tmp_path / "out", layout=layout)
    assert not list(tmp_path.iterdir())


def sharded(flash: Make, tmp_path: Path) -> Path:
    return convert(flash("toy-6b"), output=tmp_path / "source", layout="flash", options=SMALL)


def cut_short(source: Path) -> str:
    last = sorted(source.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-3])
    return rf"{last.name} has \d+ bytes, its header says \d+; copy it again"


def without_a_shard(source: Path) -> str:
    first = sorted(source.glob("*.safetensors"))[0]
    first.unlink()
    return rf"index\.json names {first.name}, absent from the folder"


def index_of_absent_files(source: Path) -> str:
    index = source / "model.safetensors.index.json"
    contents = json.loads(index.read_text())
    name = next(iter(contents["weight_map"]))
    contents["weight_map"][name] = "model-00099-of-00099.safetensors"
    index.write_text(json.dumps(contents))
    return r"index\.json names model-00099-of-00099\.safetensors, absent from the folder"


@pytest.mark.parametrize("damage", [cut_short, without_a_shard, index_of_absent_files])
@pytest.mark.parametrize("layout", ["megatron", "internvl"])
def test_broken_input_is_named(
    damage: Callable[[Path], str], layout: Layout, flash: Make, tmp_path: Path
) -> None:
    source = sharded(flash, tmp_path)
    expected = damage(source)
    with pytest.raises(CheckpointError, match=expected):
        convert(source, output=tmp_path / "out", layout=layout)
    assert [path.name for path in tmp_path.iterdir()] == ["source"], "nothing was begun"


def test_native_layout_called_flash(flash: Make, tmp_path: Path) -> None:
    """By the command line, by the config.json beside it, and by a field in its own."""
    native = flash("toy-6b", "hf")
    with pytest.raises(
        CheckpointError, match=r"has the hf layout, expected flash; give --layout hf, or none"
    ):
        convert(
            native,
            output=tmp_path / "out",
            layout="megatron",
            options=ConversionOptions(input_layout="flash"),
        )
    source = tmp_path / "source"
    shutil.copytree(native, source)
    shutil.copyfile(flash("toy-6b") / "config.json", source / "config.json")
    with pytest.raises(
        CheckpointError,
        match=r"config\.json: model_type 'internvl_chat' .* transformers' own layout",
    ):
        convert(source, output=tmp_path / "out", layout="megatron")
    config = json.loads((native / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"flash_mode": True}))
    with pytest.raises(
        CheckpointError, match=r"config\.json: model_type 'internvl' .* has no Flash form"
    ):
        convert(source, output=tmp_path / "out", layout="megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_wrong_size(flash: Make, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is toy-6b, expected toy-moe"):
        convert(
            flash("toy-6b"),
            output=tmp_path / "out",
            layout="megatron",
            options=ConversionOptions(model_size="toy-moe"),
        )
    assert not list(tmp_path.iterdir())


def test_tensors_too_many_or_too_few_are_listed(flash: Make, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = load_file(flash("toy-moe") / "model.safetensors")
    del tensors["language_model.model.layers.2.mlp.experts.3.up_proj.weight"]
    tensors["language_model.model.layers.2.mlp.experts.4.up_proj.weight"] = torch.zeros(2)
    safetensors_folder.write_folder(source, tensors=tensors.items())
    shutil.copyfile(flash("toy-moe") / "config.json", source / "config.json")
    names = [
        rf"language_model\.model\.layers\.2\.mlp\.experts\.{n}\.up_proj\.weight" for n in (3, 4)
    ]
    message = f"missing tensors: {names[0]}; tensors that no row maps: {names[1]}"
    with pytest.raises(CheckpointError, match=message):
        convert(source, output=tmp_path / "out", layout="megatron")


def test_megatron_files_cut_short_or_absent(flash: Make, tmp_path: Path) -> None:
    megatron = convert(
        flash("toy-6b"), output=tmp_path / "megatron", layout="megatron", options=SMALL
    )
    last = sorted(megatron.rglob("*.distcp"), key=lambda path: int(path.stem.split("_")[-1]))[-1]
    contents = last.read_bytes()
    last.write_bytes(contents[: len(contents) // 2])
    with pytest.raises(CheckpointError, match=rf"{last.name} cut short; copy"):
        convert(megatron, output=tmp_path / "out", layout="flash")
    last.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {last.name}, which its \.metadata"):
        convert(megatron, output=tmp_path / "out", layout="flash")
    (last.parent / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="is not a readable checkpoint"):
        convert(megatron, output=tmp_path / "out", layout="flash")
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_every_job_has_one_owner(num_ranks: int) -> None:
    def shares(sizes: list[int]) -> list[range]:
        return [Ranks(rank=rank, size=num_ranks).share(sizes) for rank in range(num_ranks)]

    for sizes in (
        [],
        [5],
        [0, 0, 0],
        [1] * 20,
        [100, 1, 1, 1],
        [1, 1, 1, 100],
        [3, 7, 1, 9, 4, 4, 2, 8],
    ):
        owners = Counter(index for share in shares(sizes) for index in share)
        assert owners == dict.fromkeys(range(len(sizes)), 1), sizes
    counts = [len(share) for share in shares([7] * 700)]
    assert max(counts) - min(counts) <= 1


def test_reading_is_asked_once_a_tensor(flash: Make, tmp_path: Path) -> None:
    """Gate and up are two items of the plan; reading their tensor for each would cost twice the
    time."""
    source = hf_source(safetensors_folder.open_folder(flash("toy-6b")))
    asked: Counter[str] = Counter()

    def read(name: str) -> Tensor:
        asked[name] += 1
        return source.read(name)

    convert(replace(source, read=read), output=tmp_path / "out", layout="megatron")
    assert set(asked.values()) == {1}
    assert asked.keys() == source.forms.keys()


def test_ranks_wait_longer_than_any_file_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an hour, torch's default, is less than a rank can need for its part of a large model."""
    begun: list[timedelta] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, timeout: begun.append(timeout)
    )
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with launched() as ranks:
        assert (ranks.rank, ranks.size) == (1, 2)
    assert begun[0] >= timedelta(days=1)
