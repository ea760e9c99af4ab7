"""What a step asks of other ranks and of the host: every collective, send, receive and read of a
tensor's value.

The recorder replaces functions of torch for the rest of the process, and so is for launches of
their own.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from megatron_vico import cpu_stand_in

COLLECTIVES = (
    *(
        "all_gather",
        "all_gather_coalesced",
        "all_gather_into_tensor",
        "all_gather_object",
        "all_reduce",
    ),
    *(
        "all_reduce_coalesced",
        "all_to_all",
        "all_to_all_single",
        "barrier",
        "broadcast",
        "broadcast_object_list",
    ),
    *(
        "gather",
        "gather_object",
        "monitored_barrier",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_tensor",
    ),
    *("scatter", "scatter_object_list"),
)
POINT_TO_POINT = ("isend", "irecv", "send", "recv")
READS = (
    *("item", "tolist", "numpy", "cpu", "nonzero"),
    *("__bool__", "__int__", "__float__", "__index__", "__iter__", "__contains__"),
)
"""On a GPU each of them waits for the device."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One call."""

    phase: str
    kind: str
    """collective, p2p or read."""

    call: str
    caller: str
    """File of the nearest frame that is not torch's, from its package on."""

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

    def watch_ranks(self) -> None:
        """See collectives, sends and receives.

        To be called before megatron-core is imported, which keeps some of these functions under its
        own names, and so before the CPU stand-in is installed.
        """
        for kind, names in (("collective", COLLECTIVES), ("p2p", POINT_TO_POINT)):
            for name in names:
                wrapped = self._distributed(kind, name, getattr(torch.distributed, name))
                # The same in both modules: P2POp asks whether its operation is distributed_c10d's.
                setattr(torch.distributed, name, wrapped)
                setattr(torch.distributed.distributed_c10d, name, wrapped)

    def watch_host(self) -> None:
        """See reads of tensors' values and waiting for the device; to be called once the stand-in
        is installed."""
        for name in READS:
            setattr(Tensor, name, self._read(name, getattr(Tensor, name)))
        torch.cuda.synchronize = self._read("synchronize", torch.cuda.synchronize)

    @contextmanager
    def during(self, phase: str, *, then: str) -> Iterator[None]:
        """Record under one name within the context, and under another after it."""
        self.phase = phase
        yield
        self.phase = then

    def of(self, *phases: str, kind: str) -> list[Event]:
        """The events of a kind in some phases."""
        return [event for event in self.events if event.phase in phases and event.kind == kind]

    def _distributed(
        self, kind: str, name: str, function: Callable[..., Any]
    ) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.phase:
                values = [*args, *kwargs.values()]
                group = next(
                    (each for each in values if isinstance(each, torch.distributed.ProcessGroup)),
                    None,
                )
                tensor = next((each for each in values if isinstance(each, Tensor)), None)
                self.events.append(
                    Event(
                        phase=self.phase,
                        kind=kind,
                        call=name,
                        caller=_caller(sys._getframe(1)),
                        num_ranks=torch.distributed.get_world_size(group),
                        shape=() if tensor is None else tuple(tensor.shape),
                        dtype="" if tensor is None else str(tensor.dtype),
                    )
                )
            return function(*args, **kwargs)

        return wrapped

    def _read(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.phase:
                caller = _caller(sys._getframe(1))
                self.events.append(Event(phase=self.phase, kind="read", call=name, caller=caller))
            return function(*args, **kwargs)

        return wrapped


def _caller(frame: FrameType | None) -> str:
    own = (__file__, cpu_stand_in.__file__)  # the stand-in passes collectives on
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and path not in own and not path.startswith("<"):
            for package in ("/megatron_vico/", "/megatron/", "/tests/"):
                _, found, rest = path.rpartition(package)
                if found:
                    return package[1:] + rest
            return path
        frame = frame.f_back
    return ""
