"""What of a half-made folder of shards is finished, so that making goes on where it was
interrupted, also by a kill.

`journal.jsonl` in the half-made folder: what is made from what, then one line for each finished run
of lines. A complete folder has `made.json` instead, which holds the first of these.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_vico.data.shards.index import INDEX_NAME, ShardFiles, hash_of_file
from megatron_vico.errors import ConfigError

JOURNAL_NAME = "journal.jsonl"
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


class Journal:
    """The journal of a half-made folder; only one process at a time can have it."""

    def __init__(self, folder: Path, made: Mapping[str, Any]) -> None:
        """Open or begin a journal, and remove files of unfinished runs.

        Args:
            folder: the half-made one; made if need be.
            made: everything that the shards' content depends on, by the names of flags where there
                are such.

        Raises:
            ConfigError: if another process has the folder, or something finished in it is made from
                something else.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._file = (folder / JOURNAL_NAME).open("a+b")
        self._file.seek(0)
        self.finished: dict[int, FinishedRun] = {}
        """By number of the run."""
        try:
            self._lock()
            self._read(made)
        except BaseException:
            self.close()
            raise
        self._remove_unfinished()

    def add(self, run: FinishedRun) -> None:
        """Note that a run's files are complete."""
        self._write(asdict(run))
        self.finished[run.number] = run

    def close(self) -> None:
        """Let other processes have the folder."""
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{self._folder}: another process is making it; wait for it, or end it."
            ) from error
        except OSError:
            pass  # a file system without locks

    def _read(self, made: Mapping[str, Any]) -> None:
        lines: list[dict[str, Any]] = []
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break  # a kill cut it short
            lines.append(json.loads(line))
            end += len(line)
        finished = [_finished_run(line) for line in lines[1:]]
        self.finished = {run.number: run for run in finished if self._is_whole(run)}
        if self.finished:
            check_made(lines[0], made, where=self._folder)
            self._file.truncate(end)
        else:
            self._file.truncate(0)
            self._write(dict(made))

    def _is_whole(self, run: FinishedRun) -> bool:
        """Whether the files are there, as long as they were; tar files are not read, for they may
        be many TB."""
        return all(
            (self._folder / shard.name).is_file()
            and (self._folder / shard.name).stat().st_size == shard.num_bytes
            and (self._folder / shard.index_name).is_file()
            and hash_of_file(self._folder / shard.index_name) == shard.index_sha256
            for shard in run.shards
        )

    def _remove_unfinished(self) -> None:
        kept = {
            name
            for run in self.finished.values()
            for s in run.shards
            for name in (s.name, s.index_name)
        }
        for path in self._folder.iterdir():
            if path.name not in kept and path.name.startswith(("shard-", INDEX_NAME, MADE_NAME)):
                path.unlink()

    def _write(self, content: dict[str, Any]) -> None:
        self._file.write(json.dumps(content).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _finished_run(fields: dict[str, Any]) -> FinishedRun:
    shards = tuple(ShardFiles(**shard) for shard in fields["shards"])
    return FinishedRun(**fields | {"shards": shards, "skipped": tuple(fields["skipped"])})


def check_made(before: Mapping[str, Any], now: Mapping[str, Any], *, where: Path) -> None:
    """Check that a folder was made, or begun, from the same input with the same settings.

    Args:
        before: as the folder says.
        now: as this command says.
        where: the folder, for errors.

    Raises:
        ConfigError: if not; says what differs.
    """
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    if names:
        differences = "; ".join(
            f"{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in names
        )
        raise ConfigError(
            f"{where}: not empty, and made from something else: {differences}. Give another --out,"
            " remove the folder, or give the command that it was made with."
        )
