"""Shards of a URL kept in a local folder, shared by all processes of a machine."""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from megatron_vico.data.shards.index import ShardFiles
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.files import INCOMPLETE_SUFFIX


class ShardCache:
    """Whole shards in a local folder, named by their sha256: no URL or version is confused.

    Our own, for fsspec's filecache has no limit in bytes, and webdataset's looks at its limit only
    now and then and lets each process fetch a shard for itself.

    A shard is opened again for each sample (some microseconds), so that removing it frees its space
    at once and the reader of that moment reads on: POSIX keeps a file until its last descriptor is
    closed. All changes of names happen under one lock; whoever fetches a shard holds the shard's
    own lock as well.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        """Take a folder of a local disk, made when needed.

        Shards that are fetched at the same time may exceed `max_bytes`, nothing else does.
        """
        self._folder, self._max_bytes = folder, max_bytes

    def read_range(
        self,
        shard: ShardFiles,
        start: int,
        end: int,
        *,
        fetch: Callable[[ShardFiles], Iterator[bytes]],
    ) -> bytes:
        """Bytes `start` to `end` of a shard, which is fetched if it is not there.

        Raises:
            ConfigError: if the folder cannot be written, or is too small for the shard.
            SampleError: if what was fetched is not what was indexed.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = self._open(shard)
            if file is None:
                with self._lock(shard.sha256):
                    file = self._open(shard)  # another process may have fetched it meanwhile
                    if file is None:
                        file = self._fetch(shard, fetch(shard))
            try:
                return os.pread(file, end - start, start)
            finally:
                os.close(file)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ConfigError(
                f"--data-cache-dir {self._folder}: {error}; "
                "give a folder of a local disk with room for --data-cache-gb."
            ) from error

    def _open(self, shard: ShardFiles) -> int | None:
        try:
            file = os.open(self._path(shard), os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(file).st_size != shard.num_bytes:
            os.close(file)
            return None  # damaged; fetching it replaces it
        os.utime(file)  # of its last use: the order of removal
        return file

    def _fetch(self, shard: ShardFiles, content: Iterator[bytes]) -> int:
        """A descriptor of the fetched shard: another process may remove its name at once."""
        unfinished = self._path(shard).with_suffix(INCOMPLETE_SUFFIX)
        with self._lock("names"):
            self._make_room(shard, own=unfinished)
            with unfinished.open("wb") as reserved:
                reserved.truncate(shard.num_bytes)  # what others count it as
        file, digest = os.open(unfinished, os.O_RDWR), hashlib.sha256()
        try:
            with open(file, "wb", closefd=False) as written:
                for chunk in content:
                    digest.update(chunk)
                    written.write(chunk)
            # Or a machine that fails could leave a file of the right size without its content.
            os.fsync(file)
            if digest.hexdigest() != shard.sha256:
                raise SampleError(
                    f"{shard.name}: fetched into {self._folder}, its content is not what was"
                    " indexed (sha256 differs); copy the shard to its URL again.",
                    cause="unreadable shard",
                )
            with self._lock("names"):
                os.replace(unfinished, self._path(shard))
        except BaseException:
            os.close(file)
            with self._lock("names"):
                unfinished.unlink(missing_ok=True)
            raise
        return file

    def _make_room(self, shard: ShardFiles, *, own: Path) -> None:
        """Remove those used longest ago, and what an ended process left half fetched."""
        if shard.num_bytes > self._max_bytes:
            raise ConfigError(
                f"--data-cache-gb {self._max_bytes / 1e9:g} is less than {shard.name} alone,"
                f" {shard.num_bytes / 1e9:g} GB; raise it to at least --shuffle-shards shards."
            )
        own.unlink(missing_ok=True)
        room = self._max_bytes - shard.num_bytes
        for unfinished in self._folder.glob(f"*{INCOMPLETE_SUFFIX}"):
            try:
                with self._lock(unfinished.stem, timeout=0):
                    unfinished.unlink()
            except Timeout:  # being fetched
                room -= unfinished.stat().st_size
        kept = [(path.stat(), path) for path in self._folder.glob("*.tar")]
        for stat, path in sorted(kept, key=lambda item: item[0].st_mtime_ns, reverse=True):
            room -= stat.st_size
            if room < 0:
                path.unlink()

    def _path(self, shard: ShardFiles) -> Path:
        return self._folder / f"{shard.sha256}.tar"

    def _lock(self, name: str, *, timeout: float = -1) -> FileLock:
        return FileLock(self._folder / f"{name}.lock", timeout=timeout)
