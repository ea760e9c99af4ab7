"""Files of a shard folder, on this machine or at any URL that fsspec opens.

Nothing here stays open across a fork: local files are read at given offsets, and fsspec's own cache
of file systems is asked for one before each read (it begins again in each process; an asynchronous
file system does not outlive a fork).
"""

import errno
import logging
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import Any

import fsspec
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from megatron_vico.config.schema import DataOptions
from megatron_vico.data.shards.index import ShardFiles
from megatron_vico.data.shards.shard_cache import ShardCache
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.files import read_plain

logger = logging.getLogger(__name__)

SCHEMES = (
    *("file", "memory", "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf"),
    *("oss", "oci", "r2"),
)
"""Of URLs that files of strangers may name, unless --data-url-schemes adds others: storage, nothing
that logs in elsewhere (ssh), reads other files' tables (reference) or unpacks (zip)."""

MAX_OPEN_FILES = 64
CHUNK_BYTES = 32 << 20
FIRST_WAIT_S = 2.0
"""Doubles with each try: five tries again take about a minute."""

PERMANENT = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    # Nothing of the network: a URL that its driver cannot parse, options it does not take, a name
    # it does not know, a driver that is not installed, an operation that fsspec's base class raises
    # for where a driver has none. Waiting mends none of them, and a bug must not hide behind a
    # minute of tries.
    *(ValueError, TypeError, AttributeError, LookupError, ImportError, NotImplementedError),
)
"""What is not tried again. All else is: when a server is away drivers raise errors of their own,
many no OSError."""
TRANSIENT_STATUS = (408, 425, 429)


def is_url(path: str | Path) -> bool:
    """Whether fsspec reads this path; file:///data is a local folder with retries and a cache."""
    return "://" in str(path)


def check_url(url: str) -> None:
    """Raise ConfigError, with fsspec's own hint, if there is no driver for a URL."""
    _file_system(url)


class OpenFiles:
    """Files that stay open, for reads at given places; safe to fork and to pickle."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def read(self, path: Path, start: int, size: int) -> bytes:
        """`size` bytes from byte `start` on; fewer only where the file ends before."""
        if path not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:  # the one opened first makes room
                os.close(self._files.pop(next(iter(self._files))))
            self._files[path] = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe is empty then
        # At an offset, so that processes that share the descriptor by a fork do not disturb each
        # other.
        return os.pread(self._files[path], size, start)

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": {}}

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)


class LocalStorage:
    """A folder of this machine; descriptors of its tar files stay open."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._files = folder, OpenFiles()

    def where(self, name: str) -> str:
        """Path of a file, for messages."""
        return str(self._folder / name)

    def size(self, name: str) -> int | None:
        """Bytes of a file."""
        with self._errors(name):
            return (self._folder / name).stat().st_size

    def read(self, name: str) -> bytes:
        """All of a file."""
        with self._errors(name):
            return read_plain(self._folder / name)

    def read_range(self, shard: ShardFiles, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of a tar file; fewer only where the file ends before."""
        with self._errors(shard.name):
            return self._files.read(self._folder / shard.name, start, end - start)

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise SampleError(
                f"{self.where(name)}: cannot be read ({error}); check disk and rights.",
                cause="unreadable shard",
            ) from error


class RemoteStorage:
    """A folder at a URL; what fails for a moment is tried again. See LocalStorage for methods."""

    def __init__(self, url: str, options: DataOptions) -> None:
        self._url, self._options = url.rstrip("/"), options
        self._cache: ShardCache | None = None
        if options.data_cache_dir is not None:
            max_bytes = int((options.data_cache_gb or 0) * 1e9)
            self._cache = ShardCache(Path(options.data_cache_dir), max_bytes=max_bytes)

    def where(self, name: str) -> str:
        """URL of a file, for messages."""
        return f"{self._url}/{name}"

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where its server does not say."""
        return self._retrying(lambda: self._size(name), name)

    def read(self, name: str) -> bytes:
        """All of a file."""

        def read() -> bytes:
            content, size = self._cat(name), self._size(name)
            if size is not None and len(content) != size:
                raise EOFError(f"{len(content)} of {size} bytes came")
            return content

        return self._retrying(read, name)

    def read_range(self, shard: ShardFiles, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of a tar file; fewer only where the file ends before."""
        if self._cache is None:
            return self._read_range(shard.name, start, end)
        return self._cache.read_range(shard, start, end, fetch=self._chunks)

    def _chunks(self, shard: ShardFiles) -> Iterator[bytes]:
        for start in range(0, shard.num_bytes, CHUNK_BYTES):
            yield self._read_range(shard.name, start, min(start + CHUNK_BYTES, shard.num_bytes))

    def _read_range(self, name: str, start: int, end: int) -> bytes:
        def read() -> bytes:
            content = self._cat(name, start=start, end=end)
            if len(content) > end - start:
                raise ValueError(
                    "more came than was asked for; the server must answer requests for a range of"
                    " bytes"
                )
            if len(content) < end - start:
                size = self._size(name)
                if size is None or size >= end or len(content) != max(0, size - start):
                    raise EOFError(f"{len(content)} bytes came for bytes {start} to {end}")
            return content

        return self._retrying(read, name)

    def _cat(self, name: str, **span: int) -> bytes:
        files, folder = _file_system(self._url)
        content: bytes = self._in_time(lambda: files.cat_file(f"{folder}/{name}", **span))
        return content

    def _size(self, name: str) -> int | None:
        files, folder = _file_system(self._url)
        size: int | None = self._in_time(lambda: files.info(f"{folder}/{name}")["size"])
        return size

    def _in_time(self, call: Callable[[], Any]) -> Any:
        """What a driver gives; TimeoutError if it takes too long, whatever its own limit is."""
        limit_s, answer = self._options.data_timeout_s / 5, Future[Any]()

        def ask() -> None:
            try:
                answer.set_result(call())
            except BaseException as error:
                answer.set_exception(error)

        # Not of a pool, which would wait for it at the end of the process.
        threading.Thread(target=ask, daemon=True).start()
        if not wait([answer], limit_s).done:
            raise TimeoutError(f"no answer within {limit_s:g} s (a fifth of --data-timeout-s)")
        return answer.result()

    def _retrying[T](self, call: Callable[[], T], name: str) -> T:
        def log(state: RetryCallState) -> None:
            assert state.outcome is not None
            assert state.next_action is not None
            logger.warning(
                "%s: %s; try %d of %d in %.1f s",
                self.where(name),
                _cause(state.outcome.exception()),
                state.attempt_number + 1,
                self._options.data_retries + 1,
                state.next_action.sleep,
            )

        retrying = Retrying(
            retry=retry_if_exception(_is_transient),
            stop=stop_after_attempt(self._options.data_retries + 1),
            wait=_wait_s,
            sleep=sleep,
            before_sleep=log,
            reraise=True,
        )
        try:
            return retrying(call)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise SampleError(
                f"{self.where(name)}: cannot be read; tries:"
                f" {retrying.statistics['attempt_number']}, last cause: {_cause(error)}; check the"
                " network and the right to read, or raise --data-retries.",
                cause="unreadable shard",
            ) from error


type Storage = LocalStorage | RemoteStorage
"""A folder's files; safe to fork and to pickle. Methods raise FileNotFoundError for a missing file,
SampleError for one that cannot be read."""


def open_storage(path: str | Path, options: DataOptions) -> Storage:
    """The files of a folder; ConfigError if it is a URL that no driver is there for."""
    if not is_url(path):
        return LocalStorage(Path(path))
    check_url(str(path))
    return RemoteStorage(str(path), options)


def _file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system, which it makes once a process, and the folder's path in it."""
    try:
        files, folder = fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{url}: fsspec cannot open it: {error}.") from error
    return files, folder.rstrip("/")


def _is_transient(error: BaseException) -> bool:
    """Whether a read may work a moment later.

    Drivers raise errors of their own for a broken connection, so that all but the known ones are
    tried again: a minute lost to an error that stays is cheaper than a run lost to one that passes.
    """
    status = getattr(error, "status", getattr(error, "code", None))  # of aiohttp, gcsfs
    if isinstance(status, int) and 400 <= status < 500:
        return status in TRANSIENT_STATUS
    if getattr(error, "errno", None) == errno.EINVAL:
        return False  # s3fs: a range behind the end of the file
    return isinstance(error, Exception) and not isinstance(error, PERMANENT)


def _cause(error: BaseException | None) -> str:
    # Not its repr: aiohttp's holds the headers of the request, and so the token that gives access.
    return f"{type(error).__name__}: {error}"


def _wait_s(state: RetryCallState) -> float:
    """Half to one and a half times the step's wait, so that ranks do not come back together.

    Drawn by the operating system: tenacity's own jitter moves the random state of the process.
    """
    return FIRST_WAIT_S * 2 ** (state.attempt_number - 1) * random.SystemRandom().uniform(0.5, 1.5)
