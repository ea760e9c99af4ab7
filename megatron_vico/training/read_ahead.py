"""The next step's packs go round while the device still works on the present step."""

from collections.abc import Iterator
from typing import Any, Self

import torch

from megatron_vico.parallel.batch import StepBatch
from megatron_vico.training.data_state import DataState
from megatron_vico.training.profiler import phase


class ReadAhead:
    """A run's batches, of which one may be read before its turn.

    For the run it is not read until it is taken: a checkpoint has the place before it, and what is
    wrong with it is raised in its own step.
    """

    def __init__(self, batches: Iterator[StepBatch], data: DataState) -> None:
        self._batches, self._data = batches, data
        self._held: tuple[StepBatch | Exception | None, Any] | None = None
        """What was read, and the reader's place behind it."""

        self._stream = torch.cuda.Stream()
        """Of its tiles: they wait for nothing that is computed."""

    def fetch(self) -> None:
        """Read the next batch; every rank calls it, when a step is queued and nothing read yet."""
        before = self._data.place()
        with phase("read ahead"), torch.cuda.stream(self._stream):
            found: StepBatch | Exception | None
            try:
                found = next(self._batches, None)
            except Exception as error:
                found = error
        self._held = found, self._data.place()
        self._data.go_back(before)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StepBatch:
        if self._held is None:
            return next(self._batches)
        (found, place), self._held = self._held, None
        self._data.go_on(place)
        if found is None:
            raise StopIteration
        if isinstance(found, Exception):
            raise found
        torch.cuda.current_stream().wait_stream(self._stream)
        if found.tiles.is_cuda:  # whose memory the other stream would else use again too early
            found.tiles.record_stream(torch.cuda.current_stream())
        return found
