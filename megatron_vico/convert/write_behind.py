"""Writes one thing while the next is being made: converting is little slower than copying."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self


class WriteBehind:
    """Does one action at a time, in order, in a thread of its own; at most one waits."""

    def __enter__(self) -> Self:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._latest: Future[object] | None = None
        return self

    def __call__(self, action: Callable[[], object]) -> None:
        """Begin an action when the one before it has ended.

        Args:
            action: reads and writes, which leave Python to the caller meanwhile.

        Raises:
            Exception: what the action before it has failed with.
        """
        if self._latest is not None:
            self._latest.result()
        self._latest = self._thread.submit(action)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._thread.shutdown()  # waits
        if error is None and self._latest is not None:
            self._latest.result()
