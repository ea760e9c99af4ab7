"""What of a half-made folder of shards is finished, so that making goes on after an interruption.

Beside its shards, a half-made folder has `made.json` (what they are made from) and `journal/`, with
a file for each finished run of lines: which shards it became, and what was left out. Hashes of
shards alone would not do: a run may have become none or several, and its skipped samples count.
"""

import fcntl
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_vico.data.shards.index import INDEX_NAME, ShardFiles, hash_of_file
from megatron_vico.errors import ConfigError
from megatron_vico.files import write_text

JOURNAL_NAME = "journal"
MADE_NAME = "made.json"


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What a run of lines became."""

    name: str
    """Of the data set."""

    number: int
    """Of the run."""

    shards: tuple[ShardFiles, ...]
    """None if all its samples were left out, several if one would have too many bytes."""

    skipped: tuple[str, ...]
    """One message for each sample left out."""

    @classmethod
    def read(cls, path: Path) -> "FinishedRun":
        """As `Journal.add` wrote it."""
        fields = json.loads(path.read_bytes())
        shards = tuple(ShardFiles(**shard) for shard in fields["shards"])
        return cls(**fields | {"shards": shards, "skipped": tuple(fields["skipped"])})


class Journal:
    """The journal of a half-made folder; only one process at a time can have it."""

    def __init__(self, folder: Path, made: Mapping[str, Any]) -> None:
        """Open or begin the journal of a half-made folder, and remove files of unfinished runs.

        Args:
            folder: made if need be.
            made: everything that the shards' content depends on, under flags' names if possible.

        Raises:
            ConfigError: if another process has the folder, or something finished in it is made from
                something else.
        """
        self._folder, self._runs = folder, folder / JOURNAL_NAME
        self._runs.mkdir(parents=True, exist_ok=True)
        self._lock = (self._runs / "lock").open("w")
        self.finished: dict[int, FinishedRun] = {}
        """By number of the run."""
        try:
            self._take_lock()
            runs = map(FinishedRun.read, self._runs.glob("*.json"))
            self.finished = {run.number: run for run in runs if self._is_whole(run)}
            if self.finished:
                check_made(json.loads((folder / MADE_NAME).read_bytes()), made, where=folder)
            else:
                write_text(folder / MADE_NAME, json.dumps(made, indent=1))
            self._remove_unfinished()
        except BaseException:
            self.close()
            raise

    def add(self, run: FinishedRun) -> None:
        """Note that a run's files are complete."""
        write_text(self._path(run.number), json.dumps(asdict(run)))
        self.finished[run.number] = run

    def close(self) -> None:
        """Let other processes have the folder."""
        self._lock.close()

    def _path(self, number: int) -> Path:
        return self._runs / f"{number:06d}.json"

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{self._folder}: another process is making it; wait for it, or end it."
            ) from error
        except OSError:
            pass  # a file system without locks

    def _is_whole(self, run: FinishedRun) -> bool:
        """Whether the files are there; of tar files, which may be many TB, only sizes are read."""
        return all(
            (self._folder / shard.name).is_file()
            and (self._folder / shard.name).stat().st_size == shard.num_bytes
            and (self._folder / shard.index_name).is_file()
            and hash_of_file(self._folder / shard.index_name) == shard.index_sha256
            for shard in run.shards
        )

    def _remove_unfinished(self) -> None:
        kept = {self._path(number) for number in self.finished}
        for run in self.finished.values():
            for shard in run.shards:
                kept |= {self._folder / shard.name, self._folder / shard.index_name}
        for pattern in ("shard-*", f"{INDEX_NAME}*", f"{JOURNAL_NAME}/*.json*"):
            for path in set(self._folder.glob(pattern)) - kept:
                path.unlink()


def check_made(before: Mapping[str, Any], now: Mapping[str, Any], *, where: Path) -> None:
    """Raise ConfigError unless a folder's input and settings are those of this command."""
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    if names:
        differences = "; ".join(
            f"{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in names
        )
        raise ConfigError(
            f"{where}: not empty, and made from something else: {differences}. Give another --out,"
            " remove the folder, or give the command that it was made with."
        )
