"""Records who does what when in one step, for a picture of the pipeline.

Each rank writes its spans as a file of Chrome's trace format, which chrome://tracing and Perfetto open as well.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Instant = Any
"""A wall-clock time in seconds, or on a GPU an event on its stream, which has a time once the stream got there."""


@dataclass(kw_only=True)
class Span:
    """One piece of work on one rank."""

    name: str
    """reference or policy."""

    kind: Literal["forward", "backward"]
    microbatch: int
    chunk: int
    start: Instant = None
    end: Instant = None


@dataclass(kw_only=True)
class StepTrace:
    """The spans of one step on one rank."""

    spans: list[Span] = field(default_factory=list)
    _origin: Instant = None
    _origin_s: float = 0.0

    def __post_init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._origin_s, self._origin = time.time(), self._now()

    @contextmanager
    def forward(self, name: str, microbatch: int, chunk: int) -> Iterator["_OpenSpan"]:
        """Record the forward pass of one pack through one chunk, and the backward pass that may follow."""
        span = Span(name=name, kind="forward", microbatch=microbatch, chunk=chunk, start=self._now())
        self.spans.append(span)
        yield _OpenSpan(self, span)
        span.end = self._now()

    def write(self, path: Path, *, rank: int) -> None:
        """Write the spans as JSON; waits for the device.

        Args:
            path: file to write.
            rank: shown as the process.
        """
        events = [
            {
                "name": f"{span.name} {span.kind} {span.microbatch}",
                "cat": f"{span.name},{span.kind}",
                "ph": "X",
                "pid": rank,
                "tid": 0,
                "ts": 1e6 * self._seconds(span.start),
                "dur": 1e6 * (self._seconds(span.end) - self._seconds(span.start)),
                "args": {
                    "model": span.name,
                    "kind": span.kind,
                    "microbatch": span.microbatch,
                    "chunk": span.chunk,
                    "rank": rank,
                },
            }
            for span in self.spans
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"traceEvents": events}), encoding="utf-8")

    def _now(self) -> Instant:
        if not torch.cuda.is_available():
            return time.time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, instant: Instant) -> float:
        if isinstance(instant, float):
            return instant
        instant.synchronize()
        return self._origin_s + float(self._origin.elapsed_time(instant)) / 1000


@dataclass(frozen=True)
class _OpenSpan:
    trace: StepTrace
    span: Span

    def until_backward(self, output: Tensor) -> Tensor:
        """The output, with a hook that records its backward pass; megatron-core may free its data in between."""
        if output.requires_grad and torch.is_grad_enabled():
            output.register_hook(self._backward_begins)
        return output

    def _backward_begins(self, grad: Tensor) -> None:
        back = Span(
            name=self.span.name,
            kind="backward",
            microbatch=self.span.microbatch,
            chunk=self.span.chunk,
            start=self.trace._now(),
        )
        self.trace.spans.append(back)

        def ends() -> None:
            back.end = self.trace._now()

        torch.autograd.Variable._execution_engine.queue_callback(ends)
