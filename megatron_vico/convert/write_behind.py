"""Writes one thing while the next is being made: converting is little slower than copying."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

Action = Callable[[], object]


@contextmanager
def write_behind() -> Iterator[Callable[[Action], None]]:
    """Gives what begins an action in a thread of its own, in order; at most one waits.

    What an action fails with is raised when the next one is begun, or at the end of the block. It
    reads and writes, which leave Python to the caller meanwhile.
    """
    latest: Future[object] | None = None

    def begin(action: Action) -> None:
        nonlocal latest
        if latest is not None:
            latest.result()
        latest = thread.submit(action)

    with ThreadPoolExecutor(max_workers=1) as thread:
        yield begin
    if latest is not None:
        latest.result()
