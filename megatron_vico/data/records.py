"""Lines of JSONL files in the official chat format, and the media that they name.

What strangers wrote is met here before anything is decoded: a document instead of lines, a line
without end, media under a key that nobody reads, names that lead out of the data's folder.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.files import open_plain

MAX_LINE_BYTES = 64 << 20
"""Of a sample's JSON; what is longer is not parsed."""

MAX_IMAGES = 1024
"""Of a sample."""

MAX_SAMPLE_BYTES = 1 << 30
"""Of a sample in a tar file, from its first member to its last, which are read at once."""

MAX_IMAGE_BYTES = MAX_SAMPLE_BYTES - 2 * MAX_LINE_BYTES
"""Of its images together; the rest is room for its text and for headers."""

_MEDIA_KEY = re.compile(
    r"(image|img|picture|photo|frame|video|audio|sound|media)s?"
    r"(_?(path|file|file_?name|url|name|list|base64|bytes))?s?"
)
_READ = {"image", "video"}


@dataclass(frozen=True, kw_only=True)
class Media:
    """What a record names."""

    images: tuple[str, ...] = ()
    video: str | None = None
    clip: Any = None


def check_lines(path: Path, *, flag: str) -> None:
    """Raise ConfigError unless a file holds lines, rather than one JSON document, and is there."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no plain file" if path.exists() else "no such file"
        raise ConfigError(
            f"{flag} {path}: {what}; expected a JSONL file in the official chat format."
        )
    with open_plain(path) as file:
        first = next((line for _, line in bounded_lines(file) if line.strip()), b"")
    first = first.removeprefix(b"\xef\xbb\xbf").strip()
    if first.startswith(b"[") or first.endswith((b"{", b"[", b",")):
        raise ConfigError(
            f"{flag} {path}: one JSON document over several lines, or a list; expected one JSON"
            f" object a line: `jq -c '.[]' {path.name}` writes the objects of a list so."
        )


def bounded_lines(file: IO[bytes], *, end: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(bytes of a line, its content) from where the file stands; no line takes endless memory.

    Of a line that is too long only the beginning comes: `parse_sample` says so.
    """
    while end is None or file.tell() < end:
        line = file.readline(MAX_LINE_BYTES + 1)
        num_bytes, rest = len(line), line
        while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES + 1)
            num_bytes += len(rest)
        if not line:
            return
        yield num_bytes, line


def media_of(record: dict[str, Any], *, where: str) -> Media:
    """What a record names as its media; SampleError for other keys or forms than are known."""
    for part in (record, *record["conversations"]):
        known = _READ if part is record else set()
        for key, value in part.items():
            if value and key not in known and _MEDIA_KEY.fullmatch(key.lower()):
                raise SampleError(
                    f"{where}: media under {key!r}, which nothing reads; rename the key 'image' (a"
                    " path or a list of paths) or 'video' (a path), beside 'conversations'."
                )
    listed, video = record.get("image") or [], record.get("video")
    names = [listed] if isinstance(listed, str) else listed
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise SampleError(f"{where}: 'image' is {listed!r}; expected a path or a list of paths.")
    if len(names) > MAX_IMAGES:
        raise SampleError(f"{where}: {len(names)} images; expected at most {MAX_IMAGES}.")
    if video and (names or not isinstance(video, str)):
        raise SampleError(
            f"{where}: 'video' is {video!r} and 'image' {record.get('image')!r}; expected the path"
            " of one video, or images."
        )
    return Media(images=tuple(names), video=video or None, clip=record.get("clip"))


def within_limit(images: Iterable[bytes], *, where: str) -> list[bytes]:
    """A sample's files as they are read; SampleError once they are too many bytes together."""
    kept, num_bytes = list[bytes](), 0
    for content in images:
        num_bytes += len(content)
        if num_bytes > MAX_IMAGE_BYTES:
            raise SampleError(
                f"{where}: images of more than {MAX_IMAGE_BYTES} bytes together; make them"
                " smaller, or remove the sample."
            )
        kept.append(content)
    return kept


def path_below(root: Path, name: str, *, where: str, allow_outside: bool) -> Path:
    """`root / name`, links followed; SampleError outside `root`, unless that is allowed."""
    path = root / name
    try:
        inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
    except ValueError as error:  # a null byte
        raise SampleError(f"{where}: {name!r} is no path ({error}).") from error
    if not (inside or allow_outside):
        raise SampleError(
            f"{where}: {name!r} leads out of {root}; move the file, or give --allow-outside-root if"
            " you trust the data."
        )
    return path
