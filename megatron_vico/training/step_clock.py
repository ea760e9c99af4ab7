"""How long the phases of a step take, without waiting for the device."""

import itertools
import time
from typing import Any

import torch

PHASES = ("encode", "reference", "policy", "encoder_backward", "optimizer")
"""Parts of a step that have a time of their own; what is between them has none."""


class StepClock:
    """Marks the moments at which a rank goes on to another phase.

    On a GPU they are moments of its stream, and the times of a step are read after the next one,
    when they have long passed: nothing waits. On a CPU it is done in the same way.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._before: list[tuple[str, Any]] = []

    def begin(self, phase: str) -> None:
        """What follows is `phase`, one of PHASES or another word for what is not timed."""
        if not self._on_gpu:
            self._marks.append((phase, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((phase, event))

    def end_step(self) -> dict[str, float]:
        """End this step; seconds of each phase of the step before, nothing after the first one."""
        self.begin("")
        marks, self._before, self._marks = self._before, self._marks, []
        seconds = dict.fromkeys(PHASES, 0.0) if marks else {}
        for (phase, start), (_, end) in itertools.pairwise(marks):
            if phase in seconds:
                seconds[phase] += _seconds(start, end)
        return seconds

    def drop_step(self) -> None:
        """Forget what was marked since the last step ended: a pass over the validation set."""
        self._marks = []


def _seconds(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    return float(start.elapsed_time(end)) / 1000
