"""Lines of JSONL files -> samples with their media, from folders, tars and videos.

Every error about a sample starts with its cause (`missing file`, `broken image`, ...), so that
causes can be counted.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_vico.data.encode.sample_encoder import SampleEncoder
from megatron_vico.data.encode.tiling import decode_image
from megatron_vico.data.encode.video import video_frames, with_frames
from megatron_vico.data.samples import ConversationSample, EncodedSample
from megatron_vico.data.shards.reader import parse_sample
from megatron_vico.data.shards.storage import OpenFiles
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.shard_tools.options import FrameOptions
from megatron_vico.shard_tools.sources import Source
from megatron_vico.vico.compression_plan import generator

FRAME_TILES = 1
"""Tiles of a video's frame; the official rule."""

PNG_START = b"\x89PNG"


@dataclass(frozen=True, kw_only=True)
class SourceSample:
    """A sample as it goes into a shard."""

    sample: ConversationSample

    suffixes: tuple[str, ...]
    """Of each image file, without a dot."""

    encoded: EncodedSample
    """With blank tiles: only their number is of interest."""


class SampleReader:
    """Turns lines of JSONL files into samples with their media."""

    def __init__(self, *, encoder: SampleEncoder, frames: FrameOptions) -> None:
        """Take an encoder, which every sample goes through, so that a broken one is found here."""
        self._encoder, self._frames, self._tars = encoder, frames, TarMembers()

    def read(self, line: bytes, *, source: Source, number: int) -> SourceSample:
        """The sample of a line, which has this number, from 1, in the source's file.

        Raises:
            SampleError: if anything about it is broken; starts with the cause, file and line.
        """
        key, where = f"{source.stem}-{number:08d}", f"{source.annotation}:{number}"
        sample_where = f"{where}: sample {key!r}"
        with _prefixed("broken line"):
            sample = parse_sample(line, key=key, images=(), where=where)
            record = json.loads(line)
            names, video = _names_of_images(record, where=sample_where), record.get("video")
            if video and (names or not isinstance(video, str)):
                raise SampleError(
                    f"{sample_where}: 'video' is {video!r} and 'image' {record.get('image')!r};"
                    " expected the path of one video, or images."
                )
        turns, max_tiles = sample.turns, source.max_dynamic_patch or sample.max_dynamic_patch
        if video:
            with _prefixed(f"broken video: {sample_where}"):
                random = generator(self._frames.seed, 0, number, f"frames of {source.stem}")
                path = source.root / video
                images = self._read_video(path, clip=record.get("clip"), random=random)
            with _prefixed(f"wrong conversation: {where}"):
                turns, max_tiles = with_frames(turns, len(images), key=key), FRAME_TILES
            suffixes = tuple("png" if image.startswith(PNG_START) else "jpg" for image in images)
        else:
            with _prefixed("missing file"):
                images = [self._read_image(source.root, name, sample_where) for name in names]
            suffixes = tuple(Path(name).suffix.lower().lstrip(".") or "img" for name in names)
        sample = replace(
            sample,
            turns=turns,
            images=tuple(images),
            max_dynamic_patch=max_tiles,
            data_augment=source.data_augment or sample.data_augment,
        )
        encoded = self._encode(sample, where=where)
        return SourceSample(sample=sample, suffixes=suffixes, encoded=encoded)

    def _read_image(self, root: Path, name: str, where: str) -> bytes:
        try:
            tar, member = split_at_tar(root / name)
            return tar.read_bytes() if member is None else self._tars.read(tar, member)
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            raise SampleError(
                f"{where}: image {name!r} cannot be read under {root}"
                f" ({getattr(error, 'strerror', error)}); restore the file or remove the sample."
            ) from error

    def _read_video(self, path: Path, *, clip: Any, random: torch.Generator) -> list[bytes]:
        is_span = isinstance(clip, list) and all(type(part) in (int, float) for part in clip)
        if clip is not None and not is_span:
            raise SampleError(f"'clip' is {clip!r}; expected [start, end] in seconds.")
        fewest, most = self._frames.min_num_frame, self._frames.max_num_frame
        try:
            return video_frames(path, random=random, min_frames=fewest, max_frames=most, clip=clip)
        except (SampleError, ConfigError):
            raise
        except (OSError, ValueError) as error:
            raise SampleError(
                f"{path} cannot be read ({error}); restore it or remove the sample."
            ) from error

    def _encode(self, sample: ConversationSample, *, where: str) -> EncodedSample:
        try:
            return self._encoder.encode_blank(sample)
        except SampleError as error:
            # Images are looked at once more only here, to tell a broken one from a wrong text.
            with _prefixed(f"broken image: {where}"):
                for number, image in enumerate(sample.images):
                    decode_image(image, key=sample.key, number=number)
            raise SampleError(f"wrong conversation: {where}: {error}") from error


class TarMembers:
    """Files inside tar files: each tar is indexed once, and a file is then one read."""

    def __init__(self) -> None:
        self._members: dict[Path, dict[str, tuple[int, int]] | str] = {}
        self._files = OpenFiles()

    def read(self, tar: Path, member: str) -> bytes:
        """Content of a member.

        Raises:
            OSError: if there is none, or the tar is broken; `strerror` names both.
        """
        if tar not in self._members:
            self._members[tar] = _index_tar(tar)
        members = self._members[tar]
        if isinstance(members, str):
            raise OSError(0, members)
        if member not in members:
            raise OSError(0, f"{tar} has no member {member!r}")
        offset, size = members[member]
        content = self._files.read(tar, offset, size)
        if len(content) != size:
            raise OSError(0, f"{tar} ends inside member {member!r}: {len(content)} of {size} bytes")
        return content


def split_at_tar(path: Path) -> tuple[Path, str | None]:
    """`archive.tar/inner/name.jpg` to the tar and the member's name; other paths to themselves."""
    for number, part in enumerate(path.parts[:-1]):
        tar = Path(*path.parts[: number + 1])
        if part.endswith(".tar") and tar.is_file():
            return tar, "/".join(path.parts[number + 1 :])
    return path, None


def _index_tar(path: Path) -> dict[str, tuple[int, int]] | str:
    """(offset, size) of each plain file by name; or what is wrong with the tar."""
    found = {}
    try:
        with tarfile.open(path, mode="r:", encoding="utf-8") as tar:
            while (member := tar.next()) is not None:
                if member.isreg() and not member.issparse():
                    found[os.path.normpath(member.name)] = (member.offset_data, member.size)
                # A kilobyte each, and there may be millions.
                tar.members.clear()  # type: ignore[attr-defined]
    except (tarfile.TarError, OSError) as error:
        return f"{path} is no complete tar file: {error}"
    return found


def _names_of_images(record: dict[str, Any], *, where: str) -> list[str]:
    listed = record.get("image") or []
    names = [listed] if isinstance(listed, str) else listed
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise SampleError(f"{where}: 'image' is {listed!r}; expected a path or a list of paths.")
    return names


@contextmanager
def _prefixed(prefix: str) -> Iterator[None]:
    try:
        yield
    except SampleError as error:
        raise SampleError(f"{prefix}: {error}") from error
