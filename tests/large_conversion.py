"""Converts a made-up checkpoint of some gigabytes both ways, and measures each conversion's memory
and speed.

    python -m tests.large_conversion FOLDER GIGABYTES

Each conversion is a process of its own, whose peak memory the kernel counts. The disk's own speed
is that of copying the same files, each flushed to the disk as a conversion does, and nothing is in
the page cache before either.
"""

import os
import shutil
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_vico.config.registry import ModelConfig

ALLOWED_BYTES = 5_000_000_000
"""Beyond one safetensors file, whatever the model's size."""

SHARD_BYTES = 1_000_000_000
"""Size of the files."""

_COPY_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One conversion."""

    what: str
    peak_bytes: int
    """Largest resident memory of its process, with Python, torch and megatron-core."""

    seconds: float
    copy_seconds: float
    """What copying its input took."""

    num_bytes: int

    @property
    def share_of_copy_speed(self) -> float:
        """1 where converting takes as long as copying; starting Python and importing torch count as
        converting."""
        return self.copy_seconds / self.seconds

    def __str__(self) -> str:
        speed, copied = (self.num_bytes / each / 1e6 for each in (self.seconds, self.copy_seconds))
        return (
            f"{self.what}: {self.num_bytes / 1e9:.1f} GB, peak memory {self.peak_bytes / 1e9:.2f}"
            f" GB, {speed:.0f} MB/s ({self.share_of_copy_speed:.2f} of the {copied:.0f} MB/s of a"
            " copy)"
        )


def measure(folder: Path, num_gb: float, *, num_attempts: int = 2) -> list[Measured]:
    """Make a checkpoint and convert it to Megatron's form and back, in an empty folder with room
    for four times its size."""
    files, megatron, back = folder / "files", folder / "megatron", folder / "back"
    _child("make", folder, num_gb)
    found = []
    for source, target, layout in ((files, megatron, "megatron"), (megatron, back, "flash")):
        copies, conversions, peaks = [], [], []
        # The best of several, taken in turns: a disk that others use is half as fast from one
        # minute to the next.
        for _ in range(num_attempts):
            start = time.monotonic()
            _copied(source, folder / "copy")
            copies.append(time.monotonic() - start)
            shutil.rmtree(target, ignore_errors=True)
            _forget(source)
            start = time.monotonic()
            peaks.append(_child("convert", folder, num_gb, str(source), str(target), layout))
            conversions.append(time.monotonic() - start)
        found.append(
            Measured(
                what=f"to {layout}",
                peak_bytes=max(peaks),
                seconds=min(conversions),
                copy_seconds=min(copies),
                num_bytes=_size(source),
            )
        )
    shutil.rmtree(folder / "copy")
    for path in files.glob("*.safetensors"):
        assert _same(path, back / path.name), f"{path.name} changed on its way"
    return found


def _child(job: str, folder: Path, num_gb: float, *words: str) -> int:
    """Runs this file in another process; returns its peak memory in bytes."""
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "tests.large_conversion",
            job,
            str(folder),
            str(num_gb),
            *words,
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


def _in_child(job: str, folder: Path, num_gb: float, *words: str) -> None:
    from megatron_vico import cpu_stand_in

    cpu_stand_in.install()
    from megatron_vico.config.registry import MODELS
    from megatron_vico.convert.convert import convert
    from megatron_vico.convert.options import ConversionOptions

    model = _large_model(num_gb)
    MODELS[model.name] = model
    if job == "make":
        _make(folder / "files", model)
    else:
        source, output, layout = words
        options = ConversionOptions(max_shard_bytes=SHARD_BYTES)
        convert(source, output=output, layout=layout, options=options)  # type: ignore[arg-type]
    # Not getrusage's ru_maxrss: it begins with the memory of the process that started this one.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024)


def _large_model(num_gb: float) -> "ModelConfig":
    """Layers like those of the 8B, or small ones where the size is that of a test, as many as make
    it; a small vision tower and vocabulary."""
    from megatron_vico.config.registry import get_model_config

    like = get_model_config("internvl3_5-8b" if num_gb >= 8 else "internvl3_5-1b").language
    language = replace(like, num_layers=1, vocab_size=1003)
    model = replace(get_model_config("toy-6b"), name="large", language=language)
    one, two = (
        replace(model, language=replace(language, num_layers=count)).parameter_counts().total
        for count in (1, 2)
    )
    num_layers = 1 + max(1, round((num_gb * 1e9 / 2 - one) / (two - one)))
    return replace(model, language=replace(language, num_layers=num_layers))


def _make(folder: Path, model: "ModelConfig") -> None:
    import torch

    from megatron_vico.convert.convert import convert
    from megatron_vico.convert.names.internvl import entries
    from megatron_vico.convert.options import ConversionOptions
    from megatron_vico.convert.source import Source, TensorInfo

    tensors = {
        name: TensorInfo(shape=row.shape, dtype=torch.bfloat16)
        for name, row in entries(model, layout="flash").items()
    }

    def read_tensor(name: str) -> torch.Tensor:
        # Any bits will do; those of tensors that could be mistaken for one another differ.
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        bits = torch.randint(
            -(2**15), 2**15, tensors[name].shape, dtype=torch.int16, generator=generator
        )
        return bits.view(torch.bfloat16)

    source = Source(model=model, where="made up", tensors=tensors, read_tensor=read_tensor)
    options = ConversionOptions(max_shard_bytes=SHARD_BYTES)
    convert(source, output=folder, layout="flash", options=options)


def _copied(source: Path, target: Path) -> None:
    _forget(source)
    shutil.rmtree(target, ignore_errors=True)
    for path in _files(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as reader, copy.open("wb") as writer:
            while piece := reader.read(_COPY_BYTES):
                writer.write(piece)
            writer.flush()
            os.fsync(writer.fileno())


def _forget(folder: Path) -> None:
    for path in _files(folder):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _same(one: Path, other: Path) -> bool:
    with one.open("rb") as left, other.open("rb") as right:
        while piece := left.read(_COPY_BYTES):
            if piece != right.read(_COPY_BYTES):
                return False
        return not right.read(1)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in _files(folder))


def _main() -> None:
    if sys.argv[1] in ("make", "convert"):
        _in_child(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:])
        return
    for each in measure(Path(sys.argv[1]), float(sys.argv[2])):
        print(each)


if __name__ == "__main__":
    _main()
