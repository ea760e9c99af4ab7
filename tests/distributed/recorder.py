"""What a step asks of other ranks and of the host: every collective, send, receive and read of a
tensor's value."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vico import cpu_stand_in

READS = ("tolist", "numpy", "cpu", "__iter__", "__contains__")
READ_OPS = ("_local_scalar_dense", "nonzero")
"""On a GPU each waits for the device; an item, and a number or a bool of a tensor, is the first."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One call."""

    phase: str
    kind: str
    """collective, p2p or read."""

    call: str
    caller: str
    """File of the nearest frame that is this project's or megatron-core's, from its package on."""

    num_ranks: int = 1
    shape: tuple[int, ...] = ()
    dtype: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether this project made the call, and not megatron-core."""
        return self.caller.startswith("megatron_vico/")


@dataclass(kw_only=True)
class Span:
    """A named range of the step, in seconds of the machine's clock."""

    name: str
    """As in a profile: policy forward pack 3 chunk 0."""

    start: float
    end: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RankRecord:
    """What one rank did in the recorded step."""

    is_first_stage: bool
    is_last_stage: bool
    met: bool
    """Whether all that this rank waited for came in time."""

    spans: tuple[Span, ...]
    events: tuple[Event, ...]
    shape_exchanges: int


@dataclass(kw_only=True)
class Recorder:
    """Events since `phase` was last set to something; in phase "" nothing is recorded."""

    phase: str = ""
    events: list[Event] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See what this thread calls in the context; a CPU's backward pass runs in it too."""
        synchronize = torch.cuda.synchronize

        def synchronized(*args: Any) -> None:
            self.note("read", "synchronize")
            synchronize(*args)

        with (
            mock.patch.object(torch.cuda, "synchronize", synchronized),
            _Operations(self),
            _Functions(self),
        ):
            yield

    @contextmanager
    def during(self, phase: str, *, then: str) -> Iterator[None]:
        """Record under one name within the context, and under another after it."""
        self.phase = phase
        yield
        self.phase = then

    def note(self, kind: str, call: str, **more: Any) -> None:
        """An event, if this phase is recorded."""
        if self.phase:
            caller = _caller(sys._getframe(1))
            self.events.append(Event(phase=self.phase, kind=kind, call=call, caller=caller, **more))


class _Functions(TorchFunctionMode):
    """Sees reads that are no operation of a CPU's."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS:
            self.recorder.note("read", func.__name__)
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Sees the operations on other ranks, and those that read."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if func.namespace == "c10d":
            self._note_ranks(name, args)
        elif name in READ_OPS:
            self.recorder.note("read", name)
        return func(*args, **(kwargs or {}))

    def _note_ranks(self, name: str, args: tuple[Any, ...]) -> None:
        tensor = args[0]
        while isinstance(tensor, (list, tuple)):
            tensor = tensor[0]
        group = next(each for each in args if isinstance(each, torch.ScriptObject))
        self.recorder.note(
            "p2p" if name.startswith(("send", "recv")) else "collective",
            name,
            num_ranks=torch.distributed.ProcessGroup.unbox(group).size(),
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype),
        )


def _caller(frame: FrameType | None) -> str:
    while frame is not None:
        path = frame.f_code.co_filename
        for package in ("/megatron_vico/", "/megatron/", "/tests/"):
            _, found, rest = path.rpartition(package)
            # This file, and the stand-in that passes collectives on, call for others.
            if found and path not in (__file__, cpu_stand_in.__file__):
                return package[1:] + rest
        frame = frame.f_back
    return ""
