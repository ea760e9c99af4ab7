"""What a tar file holds, by its headers: any sound tar, whoever made it."""

import os
import posixpath
import tarfile
from dataclasses import dataclass
from pathlib import Path

from megatron_vico.files import open_plain

MAX_MEMBERS = 10_000_000
"""Of a tar file; their names and places take about 3 GB then."""

MAX_LINKS = 40

# Of damaged headers; what the disk says stays an OSError.
_FAILURES = (
    *(tarfile.TarError, ValueError, ArithmeticError, LookupError, EOFError),
    *(MemoryError, RecursionError),
)


@dataclass(frozen=True, kw_only=True)
class TarListing:
    """The headers of a tar file, as far as they can be read."""

    members: dict[str, tuple[int, int] | str]
    """(offset, size) of each file by its plain name, in the tar's order; of what cannot be read as
    a file, what it is. Links have the place of what they lead to; folders are left out."""

    end: int
    """Byte at which the headers end or cannot be read any more."""

    error: str = ""
    """Why they cannot be read any more."""


def plain_name(name: str) -> str:
    """`./a//b.jpg`, `/a/b.jpg` and `a/b.jpg` are one file."""
    return posixpath.normpath(name).lstrip("/")


def list_tar(path: Path) -> TarListing:
    """The listing of a tar file, which may be damaged; OSError if it cannot be opened."""
    found: dict[str, tuple[int, int] | str] = {}
    links: dict[str, str] = {}
    end, error = 0, ""
    try:
        with (
            open_plain(path) as file,
            tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar,
        ):
            while (member := tar.next()) is not None:
                name = plain_name(member.name)
                links.pop(name, None)
                if member.islnk() or member.issym():
                    base = os.path.dirname(name) if member.issym() else ""
                    links[name] = plain_name(posixpath.join(base, member.linkname))
                if not member.isdir():
                    is_file = member.isreg() and not member.issparse()
                    place = (member.offset_data, member.size)
                    found[name] = place if is_file else "no plain file"
                end = tar.offset
                # A kilobyte each, and there may be millions.
                tar.members.clear()  # type: ignore[attr-defined]
                if len(found) > MAX_MEMBERS:
                    raise ValueError(f"more than {MAX_MEMBERS} members; split it")
    except _FAILURES as problem:
        error = str(problem) or type(problem).__name__
    for name, target in links.items():
        last = target
        for _ in range(MAX_LINKS):
            last = links.get(last, last)
        found[name] = found.get(last, "") if last not in links else ""
        if isinstance(found[name], str):
            found[name] = f"a link to {target!r}, where no file is"
    return TarListing(members=found, end=end, error=error)
