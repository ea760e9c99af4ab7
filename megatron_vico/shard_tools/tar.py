"""One tar file of samples and the index beside it: written sample by sample, or counted anew.

The same samples give the same bytes, whatever the clock, the locale and the process.
"""

import os
import tarfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import webdataset

from megatron_vico.data.encode.sample_encoder import SampleEncoder
from megatron_vico.data.samples import ConversationSample, EncodedSample
from megatron_vico.data.shards.index import IndexedSample, ShardFiles, ShardIndex, hash_of_file
from megatron_vico.data.shards.reader import parse_sample, sample_json
from megatron_vico.errors import SampleError

NEW_INDEX = ".npz.new"
"""Suffix of an index that `count_anew` wrote, until it takes the place of the old one."""


class ShardWriter:
    """A tar file being written; it appears under its name, with its index, when it is closed."""

    def __init__(self, path: Path) -> None:
        """Args: path: of the tar file."""
        self.path = path
        self.num_bytes = 0
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}")
        self._file = self._temporary.open("wb")
        # A fixed time stamp, so that the same input gives the same bytes; an int, for a float costs
        # 1 KiB a member.
        self._writer = webdataset.TarWriter(self._file, encoder=False, mtime=0)
        self._samples: list[IndexedSample] = []

    def add(
        self, sample: ConversationSample, *, suffixes: tuple[str, ...], encoded: EncodedSample
    ) -> int:
        """Write a sample.

        Args:
            sample: what is written.
            suffixes: of each image file, without a dot.
            encoded: the same sample, for the index; its tiles may be blank.

        Returns:
            Bytes written, tar headers not counted.
        """
        images = {
            f"{i}.{suffix}": image
            for i, (suffix, image) in enumerate(zip(suffixes, sample.images, strict=True))
        }
        members = {"__key__": sample.key, "json": sample_json(sample), **images}
        num_bytes: int = self._writer.write(members)
        self.num_bytes += num_bytes
        self._samples.append(
            _indexed(encoded, members=())
        )  # where they lie is known when the file is complete
        return num_bytes

    def close(self) -> ShardFiles:
        """Complete the tar file and write its index.

        Returns:
            Both files, as `index.json` lists them.
        """
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        members = members_of(self.path)
        assert list(members) == [sample.key for sample in self._samples], (
            "the tar file holds other samples"
        )
        samples = [replace(sample, members=members[sample.key]) for sample in self._samples]
        return _write_index(self.path, samples, index_path=self.path.with_suffix(".npz"))

    def discard(self) -> None:
        """Give up: leave no file behind, also where the disk is full."""
        for opened in (
            self._writer,
            self._file,
        ):  # the file alone, and tarfile would write its end into it later
            with suppress(OSError):
                opened.close()
        self._temporary.unlink(missing_ok=True)


def count_anew(path: Path, *, encoder: SampleEncoder) -> ShardFiles:
    """Read a tar file and write its index as `NAME.npz.new`, counted by `encoder`; nothing else is
    needed or changed.

    Args:
        path: the tar file.
        encoder: counts tokens and tiles.

    Returns:
        Both files, as `index.json` lists them once the new index has taken the old one's place.

    Raises:
        SampleError: if the tar file or a sample in it is broken.
    """
    samples = []
    with path.open("rb") as file:
        for key, members in members_of(path).items():
            parts = [os.pread(file.fileno(), size, offset) for offset, size in members]
            sample = parse_sample(parts[0], key=key, images=parts[1:], where=str(path))
            try:
                samples.append(_indexed(encoder.encode_blank(sample), members=members))
            except SampleError as error:
                raise SampleError(f"{path}: {error}") from error
    return _write_index(path, samples, index_path=path.with_suffix(NEW_INDEX))


def members_of(path: Path) -> dict[str, tuple[tuple[int, int], ...]]:
    """(offset, size) of the JSON member and then of each image in order, by key.

    Raises:
        SampleError: if the file is no complete tar file of samples.
    """
    found: dict[str, dict[int, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, encoding="utf-8") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                number = -1 if suffix == "json" else int(suffix.split(".")[0])
                found.setdefault(key, {})[number] = (member.offset_data, member.size)
        _check_end(
            path,
            max(
                (offset + size for parts in found.values() for offset, size in parts.values()),
                default=0,
            ),
        )
    except (tarfile.TarError, ValueError) as error:
        raise SampleError(
            f"{path}: not a complete tar file of samples ({error}); copy it again."
        ) from error
    for key, parts in found.items():
        if sorted(parts) != list(range(-1, len(parts) - 1)):
            raise SampleError(
                f"{path}: sample {key!r} lacks its JSON or an image; copy the file again."
            )
    return {key: tuple(parts[number] for number in sorted(parts)) for key, parts in found.items()}


def _check_end(path: Path, data_end: int) -> None:
    """Two blocks of zeros follow the last member; without them, what was cut off may have been
    whole samples."""
    with path.open("rb") as file:
        file.seek(-(-data_end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
        if file.read(2 * tarfile.BLOCKSIZE) != bytes(2 * tarfile.BLOCKSIZE):
            raise tarfile.ReadError("unexpected end of data")


def _indexed(encoded: EncodedSample, *, members: tuple[tuple[int, int], ...]) -> IndexedSample:
    return IndexedSample(
        key=encoded.key,
        members=members,
        num_tokens=int(encoded.token_ids.size),
        num_responses=int(encoded.is_response.sum()),
        tiles_per_image=encoded.tiles_per_image,
    )


def _write_index(path: Path, samples: list[IndexedSample], *, index_path: Path) -> ShardFiles:
    ShardIndex.of(samples).write(index_path)
    return ShardFiles(
        name=path.name,
        num_bytes=path.stat().st_size,
        sha256=hash_of_file(path),
        num_samples=len(samples),
        index_sha256=hash_of_file(index_path),
    )
