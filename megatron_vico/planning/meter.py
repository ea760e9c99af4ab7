"""Counts what a step takes of a rank: bytes by part, FLOPs, collectives, host waits.

A dispatch mode below autograd: it sees every operator of torch and megatron-core, forward and
backward, on tensors of any device. On "meta" it also answers what only data could say.
"""

import functools
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from megatron_vico.planning.remembered import Remembered

_PACKAGES = ("megatron_vico/", "megatron/core/")
BLOCK = 512  # CUDA's allocator rounds to it
_NOTED = 1.01  # the list of tensors at a peak is of a total at most so many times lower

PARTS = {
    "encode": "visual tokens",
    "deliver tokens": "visual tokens",
    "return gradients": "visual tokens",
    "encoder backward": "encoder activations",
    "head": "head",
    "optimizer": "optimizer",
}
"""Which part of the memory report a phase's new tensors belong to; those of others, activations."""

STATIC = ("policy", "gradients", "optimizer", "reference", "encoder")
"""Parts that live between steps."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One kind of collective, send or receive."""

    phase: str
    call: str
    group: str
    """Megatron's name of the group, and its ranks."""


@dataclass(kw_only=True)
class Counted:
    """What was counted since the last `Meter.begin`."""

    peak: Counter[str] = field(default_factory=Counter)
    """Highest total of live bytes in each phase."""

    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    """What they were, by part, in each phase."""

    tensors: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    """Large tensors at the peak of each phase, without weights, gradients and optimizer: what they
    are and who made them; their bytes and number."""

    flops: Counter[str] = field(default_factory=Counter)
    """By phase."""

    calls: dict[Call, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    """Number and bytes."""

    waits: Counter[str] = field(default_factory=Counter)
    """How often the host waits for the device, by place."""


@dataclass(slots=True)
class _Storage:
    size: int
    part: str
    text: str
    alive: Any = None


class Meter(TorchDispatchMode):
    """Watches everything that runs within it."""

    def __init__(
        self,
        *,
        counts: Callable[[Tensor], bool] = lambda tensor: tensor.device.type == "meta",
        noted_bytes: int = 2**24,
    ) -> None:
        """Of tensors that it `counts`, those of `noted_bytes` or more are listed one by one."""
        super().__init__()
        self.counted = Counted()
        self.groups: dict[str, str] = {}
        """Names of process groups."""

        self.answers: dict[Any, Callable[..., Any]] = {}
        """What stands for an operator whose result depends on data, where its first argument has
        none."""

        self.part: str | None = None
        """Where new tensors belong; None: where the phase says."""

        self.now: Counter[str] = Counter()
        """Live bytes by part."""

        self.total = 0
        self._counts, self._noted_bytes = counts, noted_bytes
        self._live: dict[int, _Storage] = {}
        self._spans: list[str] = []
        self._noted = Counter[str]()
        self._call = Remembered()

    def begin(self) -> None:
        """Count from zero; what lives stays."""
        self.counted, self._noted = Counted(), Counter()

    @property
    def phase(self) -> str:
        """Part of the step that runs: what the trainer calls it in a profile."""
        inside = torch._C._current_graph_task_id() != -1
        name = self._spans[-1] if self._spans else "between"
        return "policy backward" if inside and name != "encoder backward" else name

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """A phase of this name."""
        self._spans.append(name)
        try:
            yield
        finally:
            self._spans.pop()

    @contextmanager
    def building(self, part: str) -> Iterator[None]:
        """New tensors belong to this part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def tag(self, tensors: Iterable[Tensor | None], part: str) -> None:
        """What these tensors lie in belongs to another part from now on."""
        for tensor in tensors:
            if tensor is None or not self._counts(tensor):
                continue
            self._see(tensor, "made without an operator")
            storage = self._live[tensor.untyped_storage()._cdata]
            self.now[storage.part] -= storage.size
            self.now[part] += storage.size
            storage.part = part

    def add_flops(self, flops: float) -> None:
        """Of an operator that stands for a GPU's kernel."""
        self.counted.flops[self.phase] += int(flops)

    def add_wait(self, why: str) -> None:
        """The host waits for the device."""
        self.counted.waits[why] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            self._entered_or_left(func, args)
            return func(*args, **kwargs)
        answered, out = self._answer(func, args, kwargs)
        if not answered:
            out = self._call(func, args, kwargs)
        for each in (
            (out,) if isinstance(out, Tensor) else out if type(out) in (tuple, list) else ()
        ):
            if isinstance(each, Tensor) and self._counts(each):
                self._see(each, func._overloadpacket.__name__)
        if func.namespace == "c10d":
            self._communicated(func, args)
        elif (formula := _formula(func._overloadpacket)) is not None:
            # torch's formula of addmm knows no out_dtype, the fourth argument.
            operands = args[:3] if "dtype" in func._overloadname else args
            self.counted.flops[self.phase] += int(formula(*operands, **kwargs, out_val=out))
        return out

    def _entered_or_left(self, func: Any, args: Any) -> None:
        if "enter" in func._overloadpacket.__name__:
            self._spans.append(_phase_of(args[0]))
        else:
            self._spans.pop()

    def _see(self, tensor: Tensor, operator: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        phase = self.phase
        part = self.part or PARTS.get(phase, "activations")
        text = ""
        if size >= self._noted_bytes:
            text = f"{str(tensor.dtype)[6:]} {list(tensor.shape)}, {operator} at {site()}"
        # A reference of its own to the storage would keep it alive.
        alive = weakref.ref(storage, lambda _: self._free(key))
        self._live[key] = _Storage(size, part, text, alive)
        self.now[part] += size
        self.total += size
        counted = self.counted
        if self.total > counted.peak[phase]:
            counted.peak[phase] = self.total
            counted.parts[phase] = dict(self.now)
            if self.total > _NOTED * self._noted[phase]:
                self._note(phase)

    def _free(self, key: int) -> None:
        storage = self._live.pop(key)
        self.now[storage.part] -= storage.size
        self.total -= storage.size

    def _note(self, phase: str) -> None:
        self._noted[phase] = self.total
        found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for storage in self._live.values():
            if storage.text and storage.part not in STATIC:
                entry = found[f"{storage.part}: {storage.text}"]
                entry[0] += storage.size
                entry[1] += 1
        self.counted.tensors[phase] = {
            text: (size, number) for text, (size, number) in found.items()
        }

    def _answer(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> tuple[bool, Any]:
        """Whether there is an answer that the operator itself could not give, and the answer."""
        if func.namespace == "c10d" and "coalesced" in func._overloadpacket.__name__:
            # The only collectives without a kernel for "meta".
            return any(each.is_meta for each in _tensors(args)), FakeWork().boxed()
        if not (args and isinstance(args[0], Tensor)):
            return False, None
        to_host = _reads(func, kwargs)
        on_device = args[0].is_meta or self._counts(args[0])
        if (to_host and on_device) or _sends_and_waits(func, args, kwargs):
            self.add_wait(f"{func._overloadpacket.__name__.strip('_')} at {site()}")
        if not args[0].is_meta:
            return False, None
        if to_host == "item":
            return True, 0.0 if args[0].is_floating_point() else 0
        if to_host == "copy":
            dtype = kwargs.get("dtype") or args[0].dtype
            return True, torch.zeros(args[0].shape, dtype=dtype)
        if func is torch.ops.aten.addmm.dtype_out:
            return True, kwargs["out"]  # torch 2.11 fails to work out its shape
        if (answer := self.answers.get(func)) is not None:
            return True, answer(*args, **kwargs)
        return False, None

    def _communicated(self, func: Any, args: Any) -> None:
        sizes = [sum(each.nbytes for each in _tensors(arg)) for arg in args]
        entry = self.counted.calls[
            Call(phase=self.phase, call=func._overloadpacket.__name__, group=self._group(args))
        ]
        entry[0] += 1
        entry[1] += max(sizes, default=0)

    def _group(self, args: Any) -> str:
        for arg in args:
            if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
                group = torch.distributed.ProcessGroup.unbox(arg)
                return f"{self.groups.get(group.group_name, 'other')}({group.size()})"
        return "?"


def _phase_of(name: str) -> str:
    """A phase from what trainer or torch call a range: "policy loss pack 3 chunk 0" is the head."""
    if name.startswith("Optimizer."):
        return "optimizer"
    if name.startswith("phase: "):
        return name.removeprefix("phase: ")
    words = name.split()
    if "pack" not in words:
        return name
    return "head" if "loss" in words else f"{words[0]} forward"


@functools.cache
def _formula(packet: Any) -> Callable[..., int] | None:
    """FLOPs of an operator; attention's are counted by who calls it, who knows the documents."""
    name = packet.__name__
    if "attention" in name:
        return None
    base = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") else packet
    return flop_registry.get(base)


def _reads(func: Any, kwargs: Mapping[str, Any]) -> str:
    """How an operator brings values to the host: "item", "copy", or not at all."""
    if func is torch.ops.aten._local_scalar_dense.default:
        return "item"
    if func is torch.ops.aten._to_copy.default:
        device = kwargs.get("device")
        return "copy" if device is not None and torch.device(device).type == "cpu" else ""
    return ""


def _sends_and_waits(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator copies from the host and comes back when the copy is through."""
    if func is torch.ops.aten._to_copy.default:
        source, target, waits = args[0], kwargs.get("device"), not kwargs.get("non_blocking")
    elif func is torch.ops.aten.copy_.default:
        source, target, waits = args[1], args[0].device, not (args[2:] and args[2])
    else:
        return False
    to_host = target is None or torch.device(target).type == "cpu"
    return waits and not to_host and source.device.type == "cpu"


def site() -> str:
    """The innermost two lines of this project or of megatron-core that are being run."""
    frame, found = sys._getframe(1), list[str]()
    while (frame := frame.f_back) is not None and len(found) < 2:  # type: ignore[assignment]
        if (name := _own_name(frame.f_code.co_filename)) is not None:
            found.append(f"{name}:{frame.f_lineno}")
    return " < ".join(found) or "?"


@functools.cache
def _own_name(path: str) -> str | None:
    """A file of this project or of megatron-core, within the package."""
    if "/planning/" in path or path.endswith("cpu_stand_in.py"):
        return None
    names = (path.rpartition(package) for package in _PACKAGES)
    return next((name for _, at, name in names if at), None)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return (
        [each for item in value for each in _tensors(item)] if type(value) in (list, tuple) else []
    )
