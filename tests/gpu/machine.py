"""The device that checks run on, and how time and memory are measured there."""

import contextlib
import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_vico.config.schema import ParallelOptions
from megatron_vico.parallel.groups import Groups, started

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
Figures = dict[str, float | str]
"""What a check found, by what it is, units included."""


class Machine(contextlib.ExitStack):
    """One process and its device; process groups start when a check first asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.on_gpu else "cpu")
        self.found: Figures = {}
        """What a check that takes long has found so far: kept, should the rest of it fail."""

    @functools.cached_property
    def groups(self) -> Groups:
        return self.enter_context(started(ParallelOptions(), seed=1, timeout_minutes=5))

    def milliseconds(self, action: Callable[[], object], *, repeats: int = 3) -> float:
        """The shortest of a few calls, after one that may compile."""
        action()
        times = []
        for _ in range(repeats if self.on_gpu else 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            action()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        return min(times)

    def peak_gb(self, action: Callable[[], object]) -> float:
        """Device memory that a call takes beyond what was taken before; 0 on a CPU."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e9

    def host_waits(self, action: Callable[[], object]) -> int:
        """How often the host waits for the device in a call; 0 on a CPU."""
        # With its copies, which queue something and then wait for it.
        with torch.profiler.profile() as profile:
            action()
        return sum(each.count for each in profile.key_averages() if each.key in WAITS)

    def normal(self, *shape: int, seed: int = 0) -> Tensor:
        """Random bfloat16 numbers."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, device=self.device, generator=generator).bfloat16()
