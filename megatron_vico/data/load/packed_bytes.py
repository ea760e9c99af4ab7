"""A step's batches as one block of bytes, for the way from a loader's worker to the training
process.

torch sends each tensor through its own shared file: 20 tensors a batch, times batches of a step,
workers and prefetched steps, is more than the 1,024 files a process may have open on most machines.
A parcel is one tensor.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vico.data.samples import PackedBatch, map_tensors

ALIGNMENT = 64
"""Each tensor starts at a multiple of this many bytes, as in memory that torch allocates."""


@dataclass(frozen=True)
class _Slot:
    """Where a tensor lies in the block."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True, kw_only=True, eq=False)
class Parcel:
    """Batches whose tensors are slots of `block`."""

    block: Tensor
    """uint8."""

    batches: list[Any]
    """PackedBatch with a `_Slot` in place of each tensor."""


def wrap(batches: list[PackedBatch]) -> Parcel:
    """Copy all tensors of `batches` into one block."""
    slots: list[_Slot] = []
    tensors: list[Tensor] = []
    end = 0

    def take(tensor: Tensor) -> _Slot:
        nonlocal end
        slots.append(_Slot(end, tensor.dtype, tensor.shape))
        tensors.append(tensor)
        end += math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
        return slots[-1]

    emptied = map_tensors(batches, take)
    block = torch.empty(end, dtype=torch.uint8)
    for slot, tensor in zip(slots, tensors, strict=True):
        _view(block, slot).copy_(tensor)
    return Parcel(block=block, batches=emptied)


def unwrap(parcel: Parcel) -> list[PackedBatch]:
    """The batches, as views of the block."""
    return map_tensors(parcel.batches, lambda slot: _view(parcel.block, slot), leaf=_Slot)


def _view(block: Tensor, slot: _Slot) -> Tensor:
    num_bytes = slot.shape.numel() * slot.dtype.itemsize
    return block[slot.offset : slot.offset + num_bytes].view(slot.dtype).view(slot.shape)
