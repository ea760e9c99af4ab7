"""Lines of JSONL files -> samples with their media, from folders, tars and videos.

Every error about a sample starts with its cause (`missing file`, `broken image`, ...), so that
causes can be counted.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_vico.data.encode.sample_encoder import SampleEncoder
from megatron_vico.data.encode.video import video_frames, with_frames
from megatron_vico.data.records import media_of, path_below, within_limit
from megatron_vico.data.samples import ConversationSample, EncodedSample
from megatron_vico.data.shards.reader import parse_sample
from megatron_vico.data.shards.storage import OpenFiles
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.files import MAX_FILE_BYTES, read_plain
from megatron_vico.shard_tools.options import WriterOptions
from megatron_vico.shard_tools.sources import Source
from megatron_vico.shard_tools.tar_listing import TarListing, list_tar, plain_name
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

    def __init__(self, *, encoder: SampleEncoder, options: WriterOptions) -> None:
        """Take an encoder, which every sample goes through, so that a broken one is found here."""
        self._encoder, self._options, self._tars = encoder, options, TarMembers()

    def read(self, line: bytes, *, source: Source, number: int) -> SourceSample:
        """The sample of a line, which has this number, from 1, in the source's file.

        Raises:
            SampleError: if anything about it is broken; starts with the cause, file and line.
        """
        key, where = f"{source.stem}-{number:08d}", f"{source.annotation}:{number}"
        sample_where = f"{where}: sample {key!r}"
        with _prefixed("broken line"):
            sample = parse_sample(line, key=key, images=(), where=where)
            media = media_of(json.loads(line), where=sample_where)
        below = partial(
            path_below,
            source.root,
            where=sample_where,
            allow_outside=self._options.allow_outside_root,
        )
        turns, max_tiles = sample.turns, source.max_dynamic_patch or sample.max_dynamic_patch
        if media.video:
            with _prefixed("broken path"):
                path = below(media.video)
            with _prefixed(f"broken video: {sample_where}"):
                random = generator(self._options.seed, 0, number, f"frames of {source.stem}")
                images = self._read_video(path, clip=media.clip, random=random, below=below)
            with _prefixed(f"wrong conversation: {where}"):
                turns, max_tiles = with_frames(turns, len(images), key=key), FRAME_TILES
            suffixes = tuple("png" if image.startswith(PNG_START) else "jpg" for image in images)
        else:
            with _prefixed("broken path"):
                paths = [below(name) for name in media.images]
            with _prefixed("missing file"):
                named = zip(paths, media.images, strict=True)
                images = within_limit(
                    (self._read_image(path, name, sample_where) for path, name in named),
                    where=sample_where,
                )
            suffixes = tuple(path.suffix.lower().lstrip(".") or "img" for path in paths)
        sample = replace(
            sample,
            turns=turns,
            images=tuple(images),
            max_dynamic_patch=max_tiles,
            data_augment=source.data_augment or sample.data_augment,
        )
        encoded = self._encode(sample, where=where)
        self._check_size(encoded, where=sample_where)
        return SourceSample(sample=sample, suffixes=suffixes, encoded=encoded)

    def _read_image(self, path: Path, name: str, where: str) -> bytes:
        try:
            tar, member = split_at_tar(path)
            return read_plain(tar) if member is None else self._tars.read(tar, member)
        except OSError as error:
            raise SampleError(
                f"{where}: image {name!r} cannot be read at {path} ({error.strerror}); restore the"
                " file or remove the sample."
            ) from error

    def _read_video(
        self, path: Path, *, clip: Any, random: torch.Generator, below: Callable[[str], Path]
    ) -> list[bytes]:
        is_span = isinstance(clip, list) and all(type(part) in (int, float) for part in clip)
        if clip is not None and not is_span:
            raise SampleError(f"'clip' is {clip!r}; expected [start, end] in seconds.")
        fewest, most = self._options.min_num_frame, self._options.max_num_frame
        try:
            return video_frames(
                path,
                random=random,
                min_frames=fewest,
                max_frames=most,
                clip=clip,
                read=lambda frame: read_plain(below(str(frame.absolute()))),
            )
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
            what = error.cause if error.cause == "broken image" else "wrong conversation"
            raise SampleError(f"{what}: {where}: {error}") from error

    def _check_size(self, encoded: EncodedSample, *, where: str) -> None:
        most, tiles = self._options.seq_length, encoded.num_tiles
        most_tiles = self._options.max_tiles_per_pack
        length = encoded.token_ids.size + (self._options.tokens_kept - 1) * tiles
        if (most and length > most) or (most_tiles and tiles > most_tiles):
            raise SampleError(
                f"too large for a pack: {where}: {length} tokens (uncompressed) and {tiles} tiles;"
                f" expected at most --seq-length {most} and --max-tiles-per-pack {most_tiles}."
            )


class TarMembers:
    """Files inside tar files: each tar is indexed once, and a file is then one read."""

    def __init__(self) -> None:
        self._listings: dict[Path, TarListing] = {}
        self._files = OpenFiles()

    def read(self, tar: Path, member: str) -> bytes:
        """Content of a member; OSError, with both names, if it or a whole tar is not there."""
        if tar not in self._listings:
            self._listings[tar] = list_tar(tar)
        listing = self._listings[tar]
        if listing.error:
            raise OSError(0, f"{tar} is no complete tar file: {listing.error}")
        place = listing.members.get(plain_name(member), "not there")
        if isinstance(place, str):
            raise OSError(0, f"{tar} has no member {member!r}: it is {place}")
        offset, size = place
        if size > MAX_FILE_BYTES:
            raise OSError(0, f"member {member!r} of {tar} has more than {MAX_FILE_BYTES} bytes")
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


@contextmanager
def _prefixed(prefix: str) -> Iterator[None]:
    try:
        yield
    except SampleError as error:
        raise SampleError(f"{prefix}: {error}") from error
