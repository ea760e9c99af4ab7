"""One tar file of samples and the index beside it: written sample by sample, read by its headers.

The same samples give the same bytes, whatever the clock, the locale and the process.
"""

import os
import tarfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import webdataset

from megatron_vico.data.records import MAX_IMAGES
from megatron_vico.data.samples import EncodedSample
from megatron_vico.data.shards.index import IndexedSample, ShardFiles, ShardIndex, hash_of_file
from megatron_vico.data.shards.reader import sample_json
from megatron_vico.errors import SampleError
from megatron_vico.files import open_plain
from megatron_vico.shard_tools.sample_reader import SourceSample
from megatron_vico.shard_tools.tar_listing import list_tar


class ShardWriter:
    """A tar file being written; it appears under its name, with its index, when it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}")
        self._file = self._temporary.open("wb")
        # A fixed time stamp, so that the same input gives the same bytes; an int, for a float costs
        # 1 KiB a member.
        self._writer = webdataset.TarWriter(self._file, encoder=False, mtime=0)
        self._samples: list[IndexedSample] = []

    def add(self, read: SourceSample) -> int:
        """Write a sample and return its bytes, tar headers not counted."""
        numbered = enumerate(zip(read.suffixes, read.sample.images, strict=True))
        images = {f"{i}.{suffix}": image for i, (suffix, image) in numbered}
        members = {"__key__": read.sample.key, "json": sample_json(read.sample), **images}
        num_bytes: int = self._writer.write(members)
        self.num_bytes += num_bytes
        # Where the members lie is known when the file is complete.
        self._samples.append(indexed(read.encoded, members=()))
        return num_bytes

    def close(self) -> ShardFiles:
        """Complete the tar file and write its index; both files as `index.json` lists them."""
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        members = members_of(self.path)
        keys = [sample.key for sample in self._samples]
        assert list(members) == keys, "the tar file holds other samples"
        samples = [replace(sample, members=members[sample.key]) for sample in self._samples]
        return write_index(self.path, samples, index_path=self.path.with_suffix(".npz"))

    def discard(self) -> None:
        """Give up: leave no file behind, also where the disk is full."""
        # Closing the file alone is not enough: tarfile would write its end into it later.
        for opened in (self._writer, self._file):
            with suppress(OSError):
                opened.close()
        self._temporary.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class TarHeaders:
    """What a tar file's headers say, as far as they can be read."""

    members: dict[str, dict[int, tuple[int, int]]]
    """(offset, size) by key and number: -1 the JSON, from 0 the images, from FOREIGN all else."""

    end: int
    """Byte at which the headers end or cannot be read any more."""

    error: str = ""
    """Why they cannot be read any more."""

    foreign: str = ""
    """A member that is no part of a sample, and what it is, if there is one."""


FOREIGN = 1 << 30

IMAGE_SUFFIXES = {
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm", "pgm"),
    *("tga", "ico", "img"),
}
"""Of the only image of a sample, in WebDataset's own way: KEY.jpg beside KEY.json."""


def read_headers(path: Path) -> TarHeaders:
    """The headers of a tar file, which may be damaged."""
    found: dict[str, dict[int, tuple[int, int]]] = {}
    foreign = ""
    listing = list_tar(path)
    for name, place in listing.members.items():
        folder, _, file = name.rpartition("/")
        stem, _, suffix = file.partition(".")
        parts = found.setdefault(f"{folder}/{stem}" if folder else stem, {})
        position = _position(suffix)
        if isinstance(place, str):
            foreign = foreign or f"{name!r} ({place})"
            position, place = None, (0, 0)
        elif position is None or position in parts:
            foreign = foreign or repr(name)
            position = None
        parts[FOREIGN + len(parts) if position is None else position] = place
    return TarHeaders(members=found, end=listing.end, error=listing.error, foreign=foreign)


def _position(suffix: str) -> int | None:
    """Of a member in its sample: -1 the JSON, from 0 the images; None, no part of one."""
    number = suffix.partition(".")[0]
    if suffix == "json":
        return -1
    if number.isdecimal() and len(number) <= len(str(MAX_IMAGES)) and int(number) < MAX_IMAGES:
        return int(number)
    return 0 if suffix.lower() in IMAGE_SUFFIXES else None


def members_of(path: Path) -> dict[str, tuple[tuple[int, int], ...]]:
    """(offset, size) of the JSON member and then of each image in order, by key.

    SampleError if the file is no complete tar file of samples.
    """
    headers = read_headers(path)
    error = headers.error
    with open_plain(path) as file:
        # Two blocks of zeros follow the last member; without them, what was cut off may have been
        # whole samples.
        file.seek(headers.end)
        if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            error = error or "unexpected end of data"
    if error:
        raise SampleError(f"{path}: not a complete tar file of samples ({error}); copy it again.")
    if headers.foreign:
        raise SampleError(
            f"{path}: {headers.foreign} is no part of a sample; expected KEY.json and its images,"
            f" KEY.jpg or KEY.0.jpg to KEY.{MAX_IMAGES - 1}.jpg; remove it from the tar file."
        )
    for key, parts in headers.members.items():
        if sorted(parts) != list(range(-1, len(parts) - 1)):
            raise SampleError(
                f"{path}: sample {key!r} lacks its JSON or an image; copy the file again."
            )
    return {key: ordered(parts) for key, parts in headers.members.items()}


def ordered(parts: dict[int, tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """A sample's members as an index lists them: the JSON, then each image."""
    return tuple(parts[number] for number in sorted(parts))


def indexed(encoded: EncodedSample, *, members: tuple[tuple[int, int], ...]) -> IndexedSample:
    """What an index keeps of a sample, whose tiles may be blank."""
    return IndexedSample(
        key=encoded.key,
        members=members,
        num_tokens=int(encoded.token_ids.size),
        num_responses=int(encoded.is_response.sum()),
        tiles_per_image=encoded.tiles_per_image,
    )


def write_index(path: Path, samples: list[IndexedSample], *, index_path: Path) -> ShardFiles:
    """Write the index of a tar file; both files as `index.json` lists them."""
    ShardIndex.of(samples).write(index_path)
    return ShardFiles(
        name=path.name,
        num_bytes=path.stat().st_size,
        sha256=hash_of_file(path),
        num_samples=len(samples),
        index_sha256=hash_of_file(index_path),
    )
