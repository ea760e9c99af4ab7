"""Keeps frozen weights in the host's memory while nothing uses them."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_BLOCK = 2**30
_ALIGNMENT = 256


class HostOffload:
    """Weights that are on the device between `ready` and `release` only.

    Each weight keeps one copy in page-locked host memory for good; since it never changes,
    `release` copies nothing.
    """

    def __init__(self, params: Iterable[nn.Parameter], device: torch.device) -> None:
        """Move frozen weights to the host; `device` is where they are used."""
        self._device = device
        params = list(params)
        assert not any(param.requires_grad for param in params), (
            "only frozen weights: a trained one would change on the device"
        )
        holders = [(param, _holder(param)) for param in params]
        copies = _host_copies(
            [getattr(*holder).detach() for holder in holders], pinned=device.type == "cuda"
        )
        self._host = list(zip(holders, copies, strict=True))
        self._stream = torch.cuda.Stream()
        self._arrival: Any = None
        self.release()

    def fetch(self) -> None:
        """Begin to bring the weights, beside what the device computes; it has their memory now."""
        # That memory is the computing stream's, for its later use: only the copies are elsewhere.
        self._stream.wait_stream(torch.cuda.current_stream())
        for holder, host in self._host:
            place = torch.empty_like(host, device=self._device)
            with torch.cuda.stream(self._stream):
                place.copy_(host, non_blocking=True)
            setattr(*holder, place)
        self._arrival = self._stream.record_event()

    def ready(self) -> None:
        """Bring what is not on its way; what is queued on the device afterwards may use it."""
        if self._arrival is None:
            self.fetch()
        torch.cuda.current_stream().wait_event(self._arrival)

    def release(self) -> None:
        """Free the weights' memory on the device."""
        self._arrival = None
        for holder, host in self._host:
            setattr(*holder, host)


def _holder(param: nn.Parameter) -> str:
    """The attribute that has a weight's numbers: in TransformerEngine's FP8 tensors not `data`."""
    for name in ("_rowwise_data", "_data"):
        if isinstance(getattr(param, name, None), Tensor):
            return name
    return "data"


def _host_copies(tensors: Sequence[Tensor], *, pinned: bool) -> list[Tensor]:
    sizes, places = blocks_for([tensor.nbytes for tensor in tensors])
    blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]
    copies = []
    for tensor, (block, start) in zip(tensors, places, strict=True):
        host = blocks[block][start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies.append(host.copy_(tensor))
    return copies


def blocks_for(num_bytes: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Sizes of blocks that hold tensors one after the other, and each tensor's block and offset.

    Blocks are powers of two: torch rounds page-locked memory up to one, which a weight by itself
    fills to four fifths.
    """
    ends, places = [0], []
    for size in num_bytes:
        if ends[-1] and ends[-1] + size > _BLOCK:
            ends.append(0)
        places.append((len(ends) - 1, ends[-1]))
        ends[-1] += -(-size // _ALIGNMENT) * _ALIGNMENT
    return [1 << max(end - 1, 0).bit_length() for end in ends], places
