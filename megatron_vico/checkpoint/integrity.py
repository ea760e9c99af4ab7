"""Checksums of a folder's files: written when the folder is whole, compared before it is used.

megatron-core has SHA-256 by one rank (`verify_integrity`): 0.3 GB/s on a core here, hours for 3 TB.
CRC-32 finds damage as surely at four times that, though no forgery, and all ranks share the files.
"""

import fnmatch
import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vico.checkpoint.ranks import Ranks
from megatron_vico.checkpoint.run_folder import finished_steps, iteration_folder, resume_command
from megatron_vico.errors import CheckpointError, listed
from megatron_vico.files import open_plain, read_json, write_json

CHECKSUMS = "checksums.json"
WEIGHTS = "*.safetensors"
"""Files of an export that must be as they were; its config is there to be edited."""

_BLOCK_BYTES = 1 << 20

Sum = dict[str, Any]
"""Of a file: `bytes`, and `crc32` in hex."""


class SummedFile:
    """A new file that is written from its beginning to its end, and its checksum on the way."""

    def __init__(self, path: Path) -> None:
        """Opens it."""
        self._file = path.open("wb")
        self._crc32 = 0

    def write(self, block: bytes | memoryview) -> int:
        """As a file's."""
        self._crc32 = zlib.crc32(block, self._crc32)
        return self._file.write(block)

    def tell(self) -> int:
        """As a file's."""
        return self._file.tell()

    def flush(self) -> None:
        """To the disk, so that no crash takes it."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> Sum:
        """Flush and close it; its checksum."""
        self.flush()
        num_bytes = self.tell()
        self._file.close()
        return {"bytes": num_bytes, "crc32": f"{self._crc32:08x}"}


def crc32(blocks: Iterable[bytes | memoryview]) -> str:
    """The checksum of some bytes, in hex."""
    value = 0
    for block in blocks:
        value = zlib.crc32(block, value)
    return f"{value:08x}"


def write_checksums(
    folder: Path, *, ranks: Ranks | None = None, known: Mapping[str, Sum] | None = None
) -> None:
    """Take the checksums of all files of a whole folder; called by every rank that wrote it.

    `known` are those of files that need not be read again; of others on each rank, or the same.
    """
    ranks, known = ranks or Ranks(), dict(known or {})

    def share(names: Iterable[str]) -> dict[str, Sum]:
        own = known | ranks.agree(lambda: {name: _sum_of(folder / name) for name in names})
        return {name: each for part in ranks.gather(own) for name, each in part.items()}

    # A rank's own files first: its node has them in memory, and sees them.
    own = {path.name for path in folder.glob(f"__{ranks.rank}_*")} - known.keys()
    sums = share(sorted(own))
    rest = sorted(path.name for path in folder.iterdir() if path.is_file())
    rest = [name for name in ranks.gather(rest)[0] if name not in sums]
    sums |= share(rest[ranks.rank :: ranks.size])
    ranks.on_main(lambda: write_json(folder / CHECKSUMS, {"files": sums}))


def read_checksums(folder: Path) -> dict[str, Sum] | None:
    """What `write_checksums` wrote, None without; CheckpointError if the file is broken."""
    if not (folder / CHECKSUMS).exists():
        return None
    sums = read_json(folder / CHECKSUMS).get("files")
    if not isinstance(sums, dict) or not all(
        isinstance(each, dict) and each.keys() == {"bytes", "crc32"} and Path(name).name == name
        for name, each in sums.items()
    ):
        raise CheckpointError(f"{folder / CHECKSUMS} is no table of files and checksums.")
    return sums


def damage(folder: Path, *, ranks: Ranks | None = None, files: str = "*") -> list[str] | None:
    """A clause for each file (of those that match) that is not as written; every rank calls it.

    Returns:
        None where nobody can know: there are no checksums.

    Raises:
        CheckpointError: on all ranks, if the checksums are unreadable.
    """
    ranks = ranks or Ranks()
    check = _Check.of(folder, ranks=ranks, files=files)
    return None if check is None else check.gathered(check.own_damage())


def require_intact(folder: Path, *, ranks: Ranks | None = None, files: str = "*") -> bool:
    """Refuse a folder with damaged files, as `damage` finds them; False where nobody can know.

    Raises:
        CheckpointError: on all ranks, naming the files, and the newest step that is intact.
    """
    ranks = ranks or Ranks()
    found = damage(folder, ranks=ranks, files=files)
    _refuse(folder, found, ranks)
    return found is not None


@contextmanager
def intact_meanwhile(folder: Path, *, ranks: Ranks, files: str) -> Iterator[None]:
    """`require_intact` beside a block that reads the folder for hours: it fails when that ends."""
    check = _Check.of(folder, ranks=ranks, files=files)
    if check is None:
        yield
        return
    with ThreadPoolExecutor(1) as thread:
        own = thread.submit(check.own_damage)
        try:
            yield
        except BaseException:
            check.is_over.set()
            raise
    _refuse(folder, check.gathered(own.result()), ranks)


@dataclass(frozen=True, kw_only=True)
class _Check:
    """A folder's files and what they should be."""

    folder: Path
    ranks: Ranks
    sums: Mapping[str, Sum]
    names: Sequence[str]
    is_over: threading.Event = field(default_factory=threading.Event)
    """Set where nobody waits for the result any more."""

    @classmethod
    def of(cls, folder: Path, *, ranks: Ranks, files: str) -> "_Check | None":
        """None without checksums; called by every rank."""
        sums = ranks.gather(ranks.agree(lambda: read_checksums(folder)))[0]
        if sums is None:
            return None
        names = sorted(fnmatch.filter(sums, files))
        return cls(folder=folder, ranks=ranks, sums=sums, names=names)

    def own_damage(self) -> list[str]:
        """A clause for each damaged file of this rank's share."""
        found = []
        for name in self.names[self.ranks.rank :: self.ranks.size]:
            if self.is_over.is_set():
                break
            found.append(_damage(self.folder / name, self.sums[name]))
        return [clause for clause in found if clause]

    def gathered(self, own: list[str]) -> list[str]:
        """Those of all ranks, which all call it."""
        return sorted(clause for part in self.ranks.gather(own) for clause in part)


def is_complete(folder: Path) -> bool:
    """Whether all files that have checksums are there with their sizes; nothing is read."""
    try:
        sums = read_checksums(folder)
        return sums is not None and all(
            (folder / name).stat().st_size == each["bytes"] for name, each in sums.items()
        )
    except (OSError, CheckpointError):
        return False


def _refuse(folder: Path, found: list[str] | None, ranks: Ranks) -> None:
    if found:
        raise CheckpointError(
            f"{folder} is damaged: {listed(found)}; {_way_on(folder, ranks)}. If you changed it on"
            f" purpose, remove its {CHECKSUMS}."
        )


def _sum_of(path: Path) -> Sum:
    with open_plain(path) as stream:
        value = crc32(iter(lambda: stream.read(_BLOCK_BYTES), b""))
        return {"bytes": stream.tell(), "crc32": value}


def _damage(path: Path, expected: Sum) -> str:
    try:
        num_bytes = path.stat().st_size
        if num_bytes != expected["bytes"]:
            return f"{path.name} has {num_bytes} bytes, {expected['bytes']} were written"
        return "" if _sum_of(path) == expected else f"{path.name} differs from its checksum"
    except FileNotFoundError:
        return f"{path.name} is absent"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"


def _way_on(folder: Path, ranks: Ranks) -> str:
    root = folder.parent
    steps = ranks.gather(finished_steps(root))[0]
    if folder.name not in {iteration_folder(root, step).name for step in steps}:
        return "copy or make it again"
    for step in reversed(steps):
        other = iteration_folder(root, step)
        if other.name != folder.name and damage(other, ranks=ranks) == []:
            return (
                f"the newest intact checkpoint is {other}; to go on from it,"
                f" {resume_command(root, step)}"
            )
    return (
        f"no other checkpoint in {root} is known to be intact; copy it again, or begin a new run"
        " from an earlier stage's with --pretrained-checkpoint"
    )
