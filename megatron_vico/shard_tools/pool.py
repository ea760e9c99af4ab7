"""Work on shards, spread over processes: tasks in, a stream of progress and results out."""

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from megatron_vico.data.load.worker_life import live_as_long_as_parent
from megatron_vico.errors import ConfigError

PROGRESS_S = 0.2
"""Between two reports of progress of a worker: a message costs more than a small sample."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a task has done since it last told of it."""

    num_samples: int
    num_bytes: int


@contextmanager
def run_tasks[T, R](
    work: Callable[[T], Iterator[R | Progress]],
    tasks: Sequence[T],
    *,
    num_workers: int,
    kept: str = "",
) -> Iterator[Iterator[R | Progress]]:
    """What `work(task)` yields, for every task, in the order in which it is ready.

    At the end of the block workers stop where they next yield something. Tasks are dealt out
    beforehand, as cards are; with one, or one worker, everything happens in this process.

    Args:
        work: what to do; yields `Progress` on the way, some of which is passed on together.
        kept: a clause of what is not lost when a worker is killed, for the error.

    Raises:
        ConfigError: if a worker was killed; torch says so anywhere in the block.
    """
    num_workers = min(num_workers, len(tasks))
    results = _results(_Stream(work, tasks), num_workers if num_workers > 1 else 0)
    try:
        with closing(results):
            yield results
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ConfigError(
            f"one of {num_workers} worker processes was killed, probably for want of memory;"
            f" {kept}give the same command again, with fewer --workers if it happens again."
        ) from error


def with_progress[R](
    results: Iterator[R | Progress], *, total: int | None, done: int, shown: bool
) -> Iterator[R]:
    """The results alone; the progress among them moves a bar, which begins at `done` samples."""
    num_bytes = 0
    with tqdm(total=total, initial=done, unit=" samples", disable=not shown) as bar:
        for item in results:
            if isinstance(item, Progress):
                num_bytes += item.num_bytes
                bar.set_postfix_str(tqdm.format_sizeof(num_bytes, "B"), refresh=False)
                bar.update(item.num_samples)
            else:
                yield item


def _results[R](stream: IterableDataset[R], num_workers: int) -> Generator[Any]:
    with warnings.catch_warnings():
        # Of more workers than CPUs: they were asked for.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=num_workers,
            in_order=False,  # a worker that decodes a long video does not hold up the others
            worker_init_fn=live_as_long_as_parent,
        )
        items = iter(loader)
    for item in items:
        if isinstance(item, _Failure):
            raise item.error
        yield item


@dataclass(frozen=True)
class _Failure:
    """An error in a worker; torch would put its traceback into the message."""

    error: Exception


class _Stream[T, R](IterableDataset[R | Progress | _Failure]):
    """What the tasks yield; in a worker process, what its share of them does."""

    def __init__(self, work: Callable[[T], Iterator[R | Progress]], tasks: Sequence[T]) -> None:
        self._work, self._tasks = work, tasks

    def __iter__(self) -> Iterator[R | Progress | _Failure]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        samples = num_bytes = 0
        due = time.monotonic()
        try:
            for task in self._tasks[first::step]:
                for item in self._work(task):
                    if not isinstance(item, Progress):
                        yield item
                        continue
                    samples, num_bytes = samples + item.num_samples, num_bytes + item.num_bytes
                    if time.monotonic() >= due:
                        yield Progress(num_samples=samples, num_bytes=num_bytes)
                        samples, num_bytes, due = 0, 0, time.monotonic() + PROGRESS_S
            yield Progress(num_samples=samples, num_bytes=num_bytes)
        except Exception as error:
            yield _Failure(error)
