"""How a signal ends a run: every rank asks before each batch, and all stop before the same one."""

import signal
from collections.abc import Iterator
from types import FrameType
from typing import Literal

import torch

from megatron_vico.errors import ReadingStopped
from megatron_vico.parallel.batch import StepBatch
from megatron_vico.parallel.groups import Groups

Outcome = Literal["ended", "stopped", "interrupted"]
"""Of a run: its steps are done; a scheduler took the machines back and it is to be started again;
or its user ended it."""

_LEVELS: dict[int, Outcome] = {0: "ended", 1: "stopped", 2: "interrupted"}
_SIGNALS = {signal.SIGTERM: 1, signal.SIGUSR1: 1, signal.SIGINT: 2}


class StopSignal:
    """SIGTERM, SIGUSR1 (a scheduler) or SIGINT (Ctrl-C) ends the run with a checkpoint.

    A second SIGINT ends the process as Python does.
    """

    def __init__(self) -> None:
        self._level = 0
        self.outcome: Outcome = "ended"
        """What the ranks agreed on last."""

        for number in _SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._level == _SIGNALS[signal.SIGINT]:
            raise KeyboardInterrupt
        self._level = max(self._level, _SIGNALS[signal.Signals(number)])

    def is_received(self) -> bool:
        """Whether this rank was told to stop."""
        return self._level > 0

    def agreed(self, groups: Groups) -> Outcome:
        """How the run ends if any rank was told to stop, else "ended"; called by every rank."""
        level = torch.tensor(float(self._level), device=groups.device)
        torch.distributed.all_reduce(level, op=torch.distributed.ReduceOp.MAX)
        return _LEVELS[int(level)]

    def next_batch(self, batches: Iterator[StepBatch], groups: Groups) -> StepBatch | None:
        """The next batch, None where there is none or any rank was told to stop: see `outcome`.

        Called by every rank. A reader that waits for its workers gives up when it is told to stop.
        Other replicas may have their batch by then; so all ranks ask each other before any begins.
        """
        try:
            batch = next(batches, None)
        except ReadingStopped:
            batch = None
        self.outcome = self.agreed(groups)
        return batch if self.outcome == "ended" else None

    def batches(self, batches: Iterator[StepBatch], groups: Groups) -> Iterator[StepBatch]:
        """As long as `next_batch` gives one."""
        while (batch := self.next_batch(batches, groups)) is not None:
            yield batch
