"""Where the samples of shards come from: the official meta JSON, JSONL files, images in folders or
tars, and videos.

Every error about a sample starts with its cause (`missing file`, `broken image`, ...), so that
causes can be counted.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
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
from megatron_vico.data.shards.storage import MAX_OPEN_FILES
from megatron_vico.errors import ConfigError, SampleError, nearest
from megatron_vico.vico.compression_plan import generator

FRAME_TILES = 1
"""Tiles of a video's frame; the official rule."""

PNG_START = b"\x89PNG"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set: its conversations and media, and what the official meta JSON says of it."""

    name: str
    """Of the data set; its samples' keys are `NAME-LINE`, a dot in the name written as `_`."""

    annotation: Path
    """JSONL, one sample a line: `conversations`, and `image` (a path or a list of paths) or `video`
    (a path)."""

    root: Path
    """What paths of media start from: a folder, or a tar file of images."""

    repeat: float = 1.0
    """How often the data set comes in an epoch (`repeat_time`)."""

    data_augment: bool = False
    """Whether its tiles go through JPEG compression when they are trained."""

    max_dynamic_patch: int | None = None
    """Most tiles of an image; None, the run's."""

    length: int | None = None
    """How many lines the meta JSON says it has."""

    @property
    def stem(self) -> str:
        """What keys start with; WebDataset takes what follows a key's first dot for the member's
        suffix."""
        return self.name.replace(".", "_")

    def check(self) -> None:
        """Check that annotation and root are there.

        Raises:
            ConfigError: if not.
        """
        if not self.annotation.is_file():
            raise ConfigError(
                f"{self.annotation}: no such file; expected a JSONL file in the official chat"
                " format."
            )
        if not (self.root.is_dir() or (self.root.is_file() and self.root.suffix == ".tar")):
            raise ConfigError(
                f"{self.root}: neither a folder nor a .tar file, though paths in {self.annotation}"
                " start from it; correct the path, or unpack or decompress the archive."
            )


@dataclass(frozen=True, kw_only=True)
class FrameOptions:
    """Which frames of a video are taken."""

    seed: int = 1234
    """Of the number and the places of frames, together with the sample's key."""

    min_num_frame: int = 8
    """Fewest frames of a video (the official name)."""

    max_num_frame: int = 32
    """Most frames of a video (the official name)."""


# The official fields; `root` and `annotation` first, since data sets without them say nothing.
_META_TYPES: dict[str, tuple[type, ...]] = {
    "root": (str,),
    "annotation": (str,),
    "data_augment": (bool,),
    "repeat_time": (int, float),
    "length": (int,),
    "max_dynamic_patch": (int,),
}


def read_meta(path: str | Path) -> tuple[Source, ...]:
    """Read the official meta JSON, {name: {root, annotation, data_augment, repeat_time, length,
    max_dynamic_patch}}.

    Args:
        path: of the file. Relative paths in it start from the working directory, as in the official
            code.

    Returns:
        Its data sets, in the file's order. Only `annotation` is needed; an empty `root` is the
        annotation's folder.

    Raises:
        ConfigError: if the file or a field is wrong; names data set and field.
    """
    meta = Path(path)
    try:
        content = json.loads(meta.read_bytes(), object_pairs_hook=_unique)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--meta {meta}: cannot be read ({error}); expected the official meta JSON."
        ) from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(
            f"--meta {meta}: expected {{name: {{root, annotation, ...}}}} with at least one data"
            " set."
        )
    sources = []
    for name, fields in content.items():
        sources.append(_source(name, fields, where=f"--meta {meta}: data set {name!r}"))
        sources[-1].check()
    stems = [source.stem for source in sources]
    for source in sources:
        if stems.count(source.stem) > 1:
            raise ConfigError(
                f"--meta {meta}: several data sets whose keys start with {source.stem!r}; rename"
                " one."
            )
    return tuple(sources)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"several entries {max(names, key=names.count)!r}")
    return dict(pairs)


def _source(name: str, fields: Any, *, where: str) -> Source:
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: {fields!r}; expected an object with {', '.join(_META_TYPES)}.")
    if (
        not name
        or Path(name).name != name
        or name.startswith(".")
        or name.endswith((".partial", ".json"))
    ):
        raise ConfigError(
            f"{where}: a folder gets this name; use one without '/', a dot first, or '.partial' or"
            " '.json' last."
        )
    for field, value in fields.items():
        if field not in _META_TYPES:
            raise ConfigError(f"{where}: unknown field {field!r}{nearest(field, _META_TYPES)}.")
        types = _META_TYPES[field]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            expected = " or ".join(each.__name__ for each in types)
            raise ConfigError(f"{where}: {field} is {value!r}; expected {expected}.")
    if not fields.get("annotation"):
        raise ConfigError(f"{where}: no annotation; give the path of its JSONL file.")
    repeat, most = fields.get("repeat_time", 1), fields.get("max_dynamic_patch")
    if not 0 < repeat < float("inf"):
        raise ConfigError(
            f"{where}: repeat_time is {repeat}; expected a number above 0, or remove the data set."
        )
    if most is not None and most < 1:
        raise ConfigError(f"{where}: max_dynamic_patch is {most}; expected at least 1.")
    annotation = Path(fields["annotation"])
    return Source(
        name=name,
        annotation=annotation,
        root=Path(fields["root"]) if fields.get("root") else annotation.parent,
        repeat=float(repeat),
        data_augment=fields.get("data_augment", False),
        max_dynamic_patch=most,
        length=fields.get("length"),
    )


@dataclass(frozen=True, kw_only=True)
class LineRun:
    """Some lines of a JSONL file, one after the other."""

    number: int
    """Of the run in the file, from 0."""

    start: int
    """Byte that it starts at."""

    end: int
    """Byte after its last."""

    first_line: int
    """Number of its first line, from 1."""

    num_samples: int
    """Lines that are not blank."""


@dataclass(frozen=True, kw_only=True)
class LinePlan:
    """A JSONL file cut into runs of equally many samples."""

    sha256: str
    """Of the file."""

    runs: tuple[LineRun, ...]

    @property
    def num_samples(self) -> int:
        """Lines that are not blank."""
        return sum(run.num_samples for run in self.runs)


def cut_lines(path: Path, *, samples_per_run: int) -> LinePlan:
    """Cut a JSONL file into runs; one pass that parses nothing.

    Args:
        path: of the file.
        samples_per_run: lines of a run, blank ones not counted; the last may have fewer.

    Returns:
        Where the runs are.
    """
    digest, runs = hashlib.sha256(), list[LineRun]()
    start = end = num_samples = 0
    first_line = 1
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            digest.update(line)
            end += len(line)
            num_samples += bool(line.strip())
            if num_samples == samples_per_run:
                runs.append(_run(runs, start, end, first_line, num_samples))
                start, first_line, num_samples = end, number + 1, 0
    if num_samples:
        runs.append(_run(runs, start, end, first_line, num_samples))
    return LinePlan(sha256=digest.hexdigest(), runs=tuple(runs))


def _run(
    before: Sequence[LineRun], start: int, end: int, first_line: int, num_samples: int
) -> LineRun:
    return LineRun(
        number=len(before), start=start, end=end, first_line=first_line, num_samples=num_samples
    )


def read_lines(path: Path, run: LineRun) -> Iterator[tuple[int, bytes]]:
    """(number from 1, content) of each line of a run that is not blank."""
    with path.open("rb") as file:
        file.seek(run.start)
        content_left, number = run.end - run.start, run.first_line
        while content_left > 0:
            line = file.readline()
            content_left -= len(line)
            if line.strip():
                yield number, line
            number += 1


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
        """Args: encoder: every sample goes through it, so that a broken one is found here; frames:
        of videos."""
        self._encoder, self._frames, self._tars = encoder, frames, TarMembers()

    def read(self, line: bytes, *, source: Source, number: int) -> SourceSample:
        """The sample of a line.

        Args:
            line: JSON.
            source: the data set.
            number: of the line, from 1.

        Returns:
            The sample.

        Raises:
            SampleError: if anything about it is broken; starts with the cause, file and line.
        """
        key, where = f"{source.stem}-{number:08d}", f"{source.annotation}:{number}"
        with _prefixed("broken line"):
            sample = parse_sample(line, key=key, images=(), where=where)
            record = json.loads(line)
            names = _names_of_images(record, where=f"{where}: sample {key!r}")
            video = record.get("video")
            if video and (names or not isinstance(video, str)):
                raise SampleError(
                    f"{where}: sample {key!r}: 'video' is {video!r} and 'image'"
                    f" {record.get('image')!r}; expected the path of one video, or images."
                )
        if video:
            with _prefixed(f"broken video: {where}: sample {key!r}"):
                random = generator(self._frames.seed, 0, number, f"frames of {source.stem}")
                images = self._read_video(
                    source.root / video, clip=record.get("clip"), random=random
                )
            with _prefixed(f"wrong conversation: {where}"):
                turns = with_frames(sample.turns, len(images), key=key)
            most: int | None = FRAME_TILES
            suffixes = tuple("png" if image.startswith(PNG_START) else "jpg" for image in images)
        else:
            with _prefixed("missing file"):
                images = [
                    self._read_image(source.root, name, where=f"{where}: sample {key!r}")
                    for name in names
                ]
            turns, most = sample.turns, source.max_dynamic_patch or sample.max_dynamic_patch
            suffixes = tuple(Path(name).suffix.lower().lstrip(".") or "img" for name in names)
        augment = source.data_augment or sample.data_augment
        sample = replace(
            sample, turns=turns, images=tuple(images), max_dynamic_patch=most, data_augment=augment
        )
        return SourceSample(
            sample=sample, suffixes=suffixes, encoded=self._encode(sample, where=where)
        )

    def _read_image(self, root: Path, name: str, *, where: str) -> bytes:
        try:
            tar, member = split_at_tar(root / name)
            return (root / name).read_bytes() if member is None else self._tars.read(tar, member)
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            raise SampleError(
                f"{where}: image {name!r} cannot be read under {root}"
                f" ({getattr(error, 'strerror', error)}); restore the file or remove the sample."
            ) from error

    def _read_video(self, path: Path, *, clip: Any, random: torch.Generator) -> list[bytes]:
        if clip is not None and not (
            isinstance(clip, list) and all(type(part) in (int, float) for part in clip)
        ):
            raise SampleError(f"'clip' is {clip!r}; expected [start, end] in seconds.")
        least, most = self._frames.min_num_frame, self._frames.max_num_frame
        try:
            return video_frames(path, random=random, min_frames=least, max_frames=most, clip=clip)
        except (OSError, ValueError) as error:
            if isinstance(error, SampleError | ConfigError):
                raise
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
    """Files inside tar files: each tar is indexed once, and a file is then one read at its
    place."""

    def __init__(self) -> None:
        self._members: dict[Path, dict[str, tuple[int, int]] | str] = {}
        self._files: dict[Path, int] = {}

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
        content = os.pread(self._file(tar), size, offset)
        if len(content) != size:
            raise OSError(0, f"{tar} ends inside member {member!r}: {len(content)} of {size} bytes")
        return content

    def _file(self, tar: Path) -> int:
        if tar not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[tar] = os.open(tar, os.O_RDONLY)
        return self._files[tar]

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)


def split_at_tar(path: Path) -> tuple[Path, str | None]:
    """`archive.tar/inner/name.jpg` to the tar file and the member's name; any other path to itself
    and None."""
    for number, part in enumerate(path.parts[:-1]):
        tar = Path(*path.parts[: number + 1])
        if part.endswith(".tar") and tar.is_file():
            return tar, "/".join(path.parts[number + 1 :])
    return path, None


def _index_tar(path: Path) -> dict[str, tuple[int, int]] | str:
    """(offset, size) of each plain file by name; what is wrong with the tar, if it is broken."""
    found = {}
    try:
        with tarfile.open(path, mode="r:", encoding="utf-8") as tar:
            while (member := tar.next()) is not None:
                if member.isreg() and not member.issparse():
                    found[os.path.normpath(member.name)] = (member.offset_data, member.size)
                tar.members.clear()  # type: ignore[attr-defined]  # a kilobyte each, and there may be millions
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


def cause_of(message: str) -> str:
    """The cause that a message of `SampleReader.read` starts with."""
    return message.partition(": ")[0]
