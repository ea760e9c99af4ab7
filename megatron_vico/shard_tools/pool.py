"""Work on shards, spread over processes: tasks in, results out as they are ready, and progress on
the way."""

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vico.errors import ConfigError

type Note = Callable[[int, int], None]
"""Told of progress: samples and bytes since it was last called."""

POLL_S = 0.5


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


def run_tasks[S, T, R](
    work: Callable[[S, T, Note], R], tasks: Sequence[T], *, shared: S, num_workers: int, note: Note
) -> Generator[R]:
    """Do `work(shared, task, note)` for every task.

    Leave the iterator with `contextlib.closing`: workers then stop at their next sample, also after
    an error.

    Args:
        work: a function of a module, for workers import it.
        tasks: what is to be done; each is pickled.
        shared: what all tasks need (a tokenizer); every worker unpickles it once.
        num_workers: processes; with 1, or one task, everything happens in this one.
        note: is told of progress, in this process.

    Yields:
        Results, in the order in which they are ready.

    Raises:
        ConfigError: if a worker was killed.
    """
    if min(num_workers, len(tasks)) <= 1:
        for task in tasks:
            yield work(shared, task, note)
        return
    context = multiprocessing.get_context(
        "forkserver"
    )  # threads of this process make a plain fork unsafe
    context.set_forkserver_preload([work.__module__])
    with tempfile.TemporaryDirectory() as folder:
        progress = _Progress(Path(folder) / "progress", num_tasks=len(tasks))
        pool = ProcessPoolExecutor(
            min(num_workers, len(tasks)), mp_context=context, initializer=_prepare_worker
        )
        content = pickle.dumps(shared)
        try:
            waiting = {
                pool.submit(_run, work, content, task, progress.of(i))
                for i, task in enumerate(tasks)
            }
            while waiting:
                done, waiting = wait(waiting, timeout=POLL_S, return_when=FIRST_COMPLETED)
                note(*progress.news())
                # What is done is done, also when a worker died meanwhile.
                for future in sorted(done, key=lambda future: future.exception() is not None):
                    yield future.result()
        except BrokenProcessPool as error:
            raise ConfigError(
                f"one of {num_workers} worker processes was killed, probably for want of memory;"
                " finished work is kept: give the same command again, with fewer --workers if it"
                " happens again."
            ) from error
        finally:
            progress.stop()
            pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    """The parent wants no more results."""


class _Progress:
    """Samples and bytes of each task, and a stop sign in the last row: a file that parent and
    workers share."""

    def __init__(self, path: Path, *, num_tasks: int) -> None:
        self._path = path
        self._counts = np.memmap(path, dtype=np.int64, mode="w+", shape=(num_tasks + 1, 2))
        self._seen = np.zeros(2, dtype=np.int64)

    def of(self, task: int) -> "_TaskProgress":
        """What a worker is given to note progress of a task with."""
        return _TaskProgress(self._path, task)

    def news(self) -> tuple[int, int]:
        """Samples and bytes since the last call."""
        total = self._counts[:-1].sum(axis=0)
        samples, num_bytes = (total - self._seen).tolist()
        self._seen = total
        return samples, num_bytes

    def stop(self) -> None:
        """Make the next call of every `_TaskProgress` raise."""
        self._counts[-1] = 1


class _TaskProgress:
    """A task's row of the shared file."""

    def __init__(self, path: Path, task: int) -> None:
        self._path, self._task = path, task

    def open(self) -> Note:
        """The function that work calls for every sample."""
        counts = np.memmap(self._path, dtype=np.int64, mode="r+").reshape(-1, 2)

        def note(samples: int, num_bytes: int) -> None:
            if counts[-1, 0]:
                raise _Stopped
            counts[self._task] += samples, num_bytes

        return note


@lru_cache(maxsize=1)
def _unpickled(content: bytes) -> Any:
    return pickle.loads(content)


def _run[S, T, R](
    work: Callable[[S, T, Note], R], content: bytes, task: T, progress: _TaskProgress
) -> R:
    return work(_unpickled(content), task, progress.open())


def _prepare_worker() -> None:
    """Leave Ctrl-C to the parent, and end when it ends: an idle worker would wait for ever for a
    killed one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only for workers"
    wait_for_end([parent.sentinel])
    os._exit(1)
