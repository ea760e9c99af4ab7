"""Records who does what when in one step, for a picture of the pipeline.

Each rank writes its spans as a file of Chrome's trace format, which chrome://tracing and Perfetto
open as well.
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
"""A wall-clock time in seconds, or on a GPU an event on its stream, which has a time once the
stream got there."""

Kind = Literal["forward", "loss", "backward", "phase"]
"""A chunk's forward pass, the head and loss behind the last chunk, a backward pass, or a part of
the step that is not about one pack."""


@dataclass(kw_only=True)
class Span:
    """One piece of work on one rank."""

    name: str
    """A pass (reference, policy) or a phase."""

    kind: Kind
    microbatch: int | None = None
    chunk: int | None = None
    """Pipeline chunk of this rank, in the order of its layers."""

    start: Instant = None
    end: Instant = None


@dataclass(kw_only=True)
class StepTrace:
    """The spans of one step on one rank.

    Times are wall-clock times, so that the ranks of a machine share one clock. On a GPU they are
    those of events, taken without waiting for them (never run there).
    """

    spans: list[Span] = field(default_factory=list)
    _origin: Instant = None
    _origin_s: float = 0.0

    def __post_init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._origin_s, self._origin = time.time(), self._now()

    @contextmanager
    def span(
        self, name: str, kind: Kind, microbatch: int | None = None, chunk: int | None = None
    ) -> Iterator[Span]:
        """Record what is done within the context."""
        span = Span(name=name, kind=kind, microbatch=microbatch, chunk=chunk, start=self._now())
        self.spans.append(span)
        yield span
        span.end = self._now()

    def await_backward(self, forward: Span, output: Tensor) -> None:
        """Record the backward pass of a chunk's forward pass, if it will have one.

        Args:
            forward: the forward pass.
            output: what it returned; megatron-core may free its data in between.
        """

        def begins(grad: Tensor) -> None:
            back = Span(
                name=forward.name,
                kind="backward",
                microbatch=forward.microbatch,
                chunk=forward.chunk,
            )
            back.start = self._now()
            self.spans.append(back)

            def ends() -> None:
                back.end = self._now()

            torch.autograd.Variable._execution_engine.queue_callback(ends)

        if output.requires_grad and torch.is_grad_enabled():
            output.register_hook(begins)

    def write(self, path: Path, *, rank: int) -> None:
        """Write the spans as JSON; waits for the device.

        Args:
            path: file to write.
            rank: shown as the process.
        """
        events = [
            {
                "name": " ".join(
                    str(part)
                    for part in (span.name, span.kind, span.microbatch)
                    if part is not None
                ),
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


@contextmanager
def phase(trace: StepTrace | None, name: str) -> Iterator[None]:
    """Record a part of the step that is not about one pack; without a trace, nothing."""
    if trace is None:
        yield
        return
    with trace.span(name, "phase"):
        yield


def trace_file(save: str, iteration: int, rank: int) -> Path:
    """Where the trace of a step goes; `iteration` counts from 1."""
    return Path(save) / "trace" / f"step_{iteration:07d}" / f"rank_{rank:04d}.json"
