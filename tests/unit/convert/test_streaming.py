"""A conversion tensor by tensor: it writes what training writes, and failures leave nothing."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_vico.checkpoint import run_folder, training_checkpoint
from megatron_vico.checkpoint.ranks import Ranks, launched
from megatron_vico.checkpoint.run_folder import iteration_folder
from megatron_vico.config.registry import get_model_config
from megatron_vico.convert import convert as conversion
from megatron_vico.convert.convert import convert
from megatron_vico.convert.huggingface.safetensors_folder import SafetensorsFolder
from megatron_vico.convert.megatron.reader import open_dcp
from megatron_vico.convert.open import hf_source, open_source
from megatron_vico.convert.options import ConversionOptions, Layout
from megatron_vico.convert.source import Source
from megatron_vico.errors import CheckpointError
from tests.hf_exports import export_hf
from tests.peak_bytes import PeakBytes
from tests.tensor_files import read_all, same, same_bits
from tests.toy_models import make_encoder, make_language_model
from tests.unit.convert.folders import MakeFolder, Tensors, changed_copy

TOYS = ("toy", "toy-6b", "toy-moe")
SMALL = ConversionOptions(max_shard_bytes=100_000)
"""So that toys make several files."""

FILE = "model.safetensors"
VERIFIED = ConversionOptions(verify=True)


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
    saved = training_checkpoint.save_checkpoint(
        iteration_folder(tmp_path / "saved", 0),
        modules=modules,
        metadata=run_folder.metadata_of(model, stage="pretrain"),
    )
    files = tmp_path / "files"
    export_hf(files, **modules, model=model, layout="flash")  # type: ignore[arg-type]
    convert(files, output=tmp_path / "streamed", layout="megatron")
    streamed = run_folder.find_iteration(tmp_path / "streamed")
    one, other = (
        FileSystemReader(each).read_metadata().state_dict_metadata for each in (saved, streamed)
    )
    assert one.keys() == other.keys()
    for key, expected in one.items():
        found = other[key]
        assert type(found) is type(expected), key
        if isinstance(expected, TensorStorageMetadata):
            assert isinstance(found, TensorStorageMetadata)
            assert found.size == expected.size, key
            assert found.properties.dtype == expected.properties.dtype, key
            assert cuts(found) == cuts(expected), key
    tensors, streamed_tensors = open_dcp(saved), open_dcp(streamed)
    for name in tensors.tensors:
        assert same_bits(tensors.read_tensor(name), streamed_tensors.read_tensor(name)), name
    fresh = {
        "encoder": make_encoder(model, seed=5).to(dtype),
        "language_model": make_language_model(model, seed=5).to(dtype),
    }
    training_checkpoint.load_weights(tmp_path / "streamed", modules=fresh, model_size=size)
    for name, module in modules.items():
        loaded = dict(fresh[name].named_parameters())
        assert all(torch.equal(loaded[key], each) for key, each in module.named_parameters())


def cuts(stored: TensorStorageMetadata) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    return {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in stored.chunks}


def test_numbers_that_are_no_numbers_survive(folder_of: MakeFolder, tmp_path: Path) -> None:
    """Bits, not values: NaN with a payload, minus zero, and the smallest numbers there are."""
    name = "mlp1.1.weight"
    strange = torch.tensor([0x7FC12345, 0x80000000, 1, 0x7F800000, 0xFF800000], dtype=torch.uint32)

    def edit(tensors: Tensors) -> None:
        tensors[name].view(torch.int32).flatten()[:5] = strange.view(torch.int32)

    source = changed_copy(folder_of("toy-6b"), tmp_path / "source", tensors=edit)
    run = convert(source, output=tmp_path / "megatron", layout="megatron", options=VERIFIED)
    back = convert(run, output=tmp_path / "back", layout="flash", options=VERIFIED)
    found = read_all(back)[name]
    assert torch.equal(found.view(torch.int32).flatten()[:5], strange.view(torch.int32))


def test_mixed_formats_survive(folder_of: MakeFolder, tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        for name in tensors:
            if name.startswith("language_model.model.layers.1."):
                tensors[name] = tensors[name].bfloat16()

    source = changed_copy(folder_of("toy-6b"), tmp_path / "source", tensors=edit)
    options = replace(SMALL, verify=True)
    made = convert(source, output=tmp_path / "hf", layout="flash", options=options)
    assert same(read_all(made), read_all(source))
    # Megatron's form has one tensor for a weight of all layers, and so one format: nothing is
    # rounded unasked.
    names = r"layers\.0\.[\w.]+ is float32, [\w.]+layers\.1\.[\w.]+ is bfloat16"
    with pytest.raises(CheckpointError, match=rf"{names}; .* give --dtype \(fp32 loses nothing\)"):
        convert(source, output=tmp_path / "megatron", layout="megatron")
    options = ConversionOptions(dtype="fp32")
    run = convert(source, output=tmp_path / "megatron", layout="megatron", options=options)
    back = convert(run, output=tmp_path / "back", layout="flash")
    expected = {name: tensor.float() for name, tensor in read_all(source).items()}
    assert same(read_all(back), expected)


def test_holds_a_tensor_at_a_time(folder_of: MakeFolder, tmp_path: Path) -> None:
    """Tensors alive at once; tests/test_large_conversion.py measures the process's memory."""
    sizes = [each.nbytes for each in load_file(folder_of("toy-6b") / "model.safetensors").values()]
    with PeakBytes() as there:
        convert(folder_of("toy-6b"), output=tmp_path / "megatron", layout="megatron")
    with PeakBytes() as back:
        convert(tmp_path / "megatron", output=tmp_path / "back", layout="flash")
    assert there.peak < 2.5 * max(sizes)  # measured 1.0
    assert back.peak < 2.5 * max(sizes)  # measured 2.0
    assert sum(sizes) > 5 * max(sizes), "holding everything would show"


def largest_file(folder: Path) -> Path:
    files = [path for path in folder.rglob("*") if path.suffix in (".distcp", ".safetensors")]
    return max(files, key=lambda path: path.stat().st_size)


def flip(folder: Path) -> None:
    """Change the lowest bit of a number, behind everything that describes the file."""
    path = largest_file(folder)
    contents = bytearray(path.read_bytes())
    if path.suffix == ".safetensors":
        position = len(contents) - 4
    else:  # a zip archive a tensor: the middle of the largest one's numbers
        stored = FileSystemReader(path.parent).read_metadata().storage_data.values()
        own = [each for each in stored if each.relative_path == path.name]
        largest = max(own, key=lambda each: each.length)
        position = largest.offset + largest.length // 2
    contents[position] ^= 1
    path.write_bytes(contents)


def cut(folder: Path) -> None:
    os.truncate(largest_file(folder), largest_file(folder).stat().st_size // 2)


@pytest.mark.parametrize("layout", ["megatron", "flash"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(flip, r"differs from .* in [\w.]+"), (cut, "cannot be compared with .*")],
)
def test_verify_marks_an_output_that_the_disk_does_not_keep(
    damage: Callable[[Path], None],
    message: str,
    layout: Layout,
    folder_of: MakeFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, output = folder_of("toy-6b"), tmp_path / "out"

    def after_damage(path: Path, **words: str) -> Source:
        if Path(path) == output:
            damage(output)
        return open_source(path, **words)  # type: ignore[arg-type]

    monkeypatch.setattr(conversion, "open_source", after_damage)
    with pytest.raises(CheckpointError, match=rf"out {message}; it is now .*out\.incomplete"):
        convert(source, output=output, layout=layout, options=VERIFIED)
    assert [path.name for path in tmp_path.iterdir()] == ["out.incomplete"]
    monkeypatch.undo()
    convert(source, output=output, layout=layout, options=VERIFIED)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_verify_compares_with_what_was_read(
    folder_of: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that gives something else the second time, in the input and in the output alike."""
    source, output = folder_of("toy-6b"), tmp_path / "out"

    def after_damage(path: Path, **words: str) -> Source:
        opened = open_source(path, **words)  # type: ignore[arg-type]
        if Path(path) == output:
            flip(output)
            shutil.copyfile(output / FILE, source / FILE)
        return opened

    source = shutil.copytree(source, tmp_path / "source")
    monkeypatch.setattr(conversion, "open_source", after_damage)
    with pytest.raises(CheckpointError, match=r"out differs from .*source .* in [\w.]+; it is now"):
        convert(source, output=output, layout="flash", options=VERIFIED)


def convert_half(source: Path, output: Path, layout: Layout) -> None:
    read, names = SafetensorsFolder.read_tensor, list[str]()

    def read_some(folder: SafetensorsFolder, name: str) -> Tensor:
        names.append(name)
        if len(names) == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(folder, name)

    SafetensorsFolder.read_tensor = read_some  # type: ignore[method-assign]
    convert(source, output=output, layout=layout)


@pytest.mark.parametrize("layout", ["megatron", "internvl"])
def test_killed_halfway(layout: Layout, folder_of: MakeFolder, tmp_path: Path) -> None:
    """What is left has another name, no reader takes it, and the next conversion starts over."""
    source, output = folder_of("toy-6b"), tmp_path / "out"
    arguments = (source, output, layout)
    process = multiprocessing.get_context("fork").Process(target=convert_half, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = tmp_path / "out.incomplete"
    assert [path.name for path in tmp_path.iterdir()] == [left.name]
    assert largest_file(left).exists(), "it was at work"
    for read in (run_folder.find_iteration, run_folder.read_metadata, open_source, hf_source):
        with pytest.raises(CheckpointError, match="never finished"):
            read(left)
    with pytest.raises(CheckpointError, match="never finished"):
        convert(left, output=tmp_path / "again", layout="flash")
    convert(source, output=output, layout=layout, options=VERIFIED)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """A limit on the size of files: the nearest to a full disk that needs no root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("layout", ["megatron", "internvl"])
@pytest.mark.parametrize("fails", ["write", "fsync", "space"])
def test_full_disk(
    fails: str,
    layout: Layout,
    folder_of: MakeFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    source = folder_of("toy-6b")

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def little(path: Path) -> shutil._ntuple_diskusage:
        return shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)

    if fails == "write":
        request.getfixturevalue("small_files")
        expected = r"could not write .*out: .*File too large"
    elif fails == "fsync":  # the disk fills up while it is written
        monkeypatch.setattr(os, "fsync", no_space)
        expected = r"could not write .*out: .*No space left on device; nothing is left of it"
    else:
        monkeypatch.setattr(shutil, "disk_usage", little)
        expected = r"out.* needs [\d.]+ GB, its disk has 0\.0 GB free; nothing was written"
    with pytest.raises(CheckpointError, match=expected):
        convert(source, output=tmp_path / "out", layout=layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "sizes",
    [[], [5], [0, 0, 0], [1] * 20, [100, 1, 1, 1], [1, 1, 1, 100], [3, 7, 1, 9, 4, 4, 2, 8]],
)
def test_every_job_has_one_owner(num_ranks: int, sizes: list[int]) -> None:
    def shares(sizes: list[int]) -> list[range]:
        return [Ranks(rank=rank, size=num_ranks).share(sizes) for rank in range(num_ranks)]

    owners = Counter(index for share in shares(sizes) for index in share)
    assert owners == dict.fromkeys(range(len(sizes)), 1)
    counts = [len(share) for share in shares([7] * 700)]
    assert max(counts) - min(counts) <= 1


def test_reading_is_asked_once_a_tensor(folder_of: MakeFolder, tmp_path: Path) -> None:
    """Gate and up are two items of the plan; reading for each would cost twice the time."""
    source = hf_source(folder_of("toy-6b"))
    asked: Counter[str] = Counter()

    def read_tensor(name: str) -> Tensor:
        asked[name] += 1
        return source.read_tensor(name)

    counted = replace(source, read_tensor=read_tensor)
    convert(counted, output=tmp_path / "out", layout="megatron")
    assert set(asked.values()) == {1}
    assert asked.keys() == source.tensors.keys()


def test_ranks_wait_longer_than_any_file_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an hour, torch's default, is less than a rank can need for its part of a large model."""
    begun: list[timedelta] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    distributed = torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(
        distributed, "init_process_group", lambda backend, timeout: begun.append(timeout)
    )
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: None)
    with launched() as ranks:
        assert (ranks.rank, ranks.size) == (1, 2)
    assert begun[0] >= timedelta(days=1)
