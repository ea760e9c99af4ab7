"""Keeps frozen weights in the host's memory while nothing uses them."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class HostOffload:
    """Weights that are on the device between `fetch` and `release` only.

    Each weight keeps one copy in page-locked host memory for good; since it never changes,
    `release` copies nothing.
    """

    def __init__(self, params: Iterable[nn.Parameter], device: torch.device) -> None:
        """Move frozen weights to the host; `device` is where they are used."""
        self._device = device
        self._host: list[tuple[nn.Parameter, Tensor]] = []
        for param in params:
            assert not param.requires_grad, (
                "only frozen weights: a trained one would change on the device"
            )
            host = param.detach().cpu()
            self._host.append((param, host.pin_memory() if device.type == "cuda" else host))
        self.release()

    def fetch(self) -> None:
        """Bring the weights to the device; they may be used by what is queued there afterwards."""
        for param, host in self._host:
            param.data = host.to(self._device, non_blocking=True)

    def release(self) -> None:
        """Free the weights' memory on the device."""
        for param, host in self._host:
            param.data = host
