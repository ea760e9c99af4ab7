"""Packs of a step as one block of bytes, from a loader's worker to every rank of a replica.

torch sends each tensor through its own shared file: 20 tensors a pack, times packs of a step,
workers and prefetched steps, is more than the 1,024 files a process may have open on most machines.
So a worker makes one tensor. The tiles, nearly all of the bytes, lie at its end: the rest goes to
all ranks (parallel/batch.py), each tile to one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vico.data.samples import ByteArray, PackedBatch, map_tensors

ALIGNMENT = 64
"""Each tensor starts at a multiple of this many bytes, as in memory that torch allocates."""


@dataclass(frozen=True)
class _Slot:
    """Where a tensor lies in the block."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedBytes:
    """Packs whose tensors are slots of a block, and the tiles of those packs."""

    packs: list[Any]
    """PackedBatch with a `_Slot` in place of each tensor."""

    block: Tensor
    """uint8: the packs' tensors, then their tiles."""

    text_bytes: int
    """Where the tiles begin."""

    tile_shape: tuple[int, ...]
    """(3, S, S)."""

    @property
    def text(self) -> Tensor:
        """uint8, all but the tiles."""
        return self.block[: self.text_bytes]

    @property
    def tiles(self) -> Tensor:
        """[N, 3, S, S] uint8 RGB, not normalised; of all packs, in order."""
        return self.block[self.text_bytes :].view(-1, *self.tile_shape)


def wrap(packs: Sequence[PackedBatch], tiles: Sequence[ByteArray]) -> PackedBytes:
    """Copy tensors of `packs`, and `tiles` (one or more [n, 3, S, S], n may be 0), into a block."""
    placed: list[tuple[_Slot, Tensor]] = []
    end = 0

    def take(tensor: Tensor) -> _Slot:
        nonlocal end
        slot = _Slot(end, tensor.dtype, tensor.shape)
        placed.append((slot, tensor))
        end += math.ceil(tensor.nbytes / ALIGNMENT) * ALIGNMENT
        return slot

    with_slots = map_tensors(list(packs), take)
    parts = [torch.from_numpy(part) for part in tiles]
    wrapped = PackedBytes(
        packs=with_slots,
        block=torch.empty(end + sum(part.nbytes for part in parts), dtype=torch.uint8),
        text_bytes=end,
        tile_shape=tuple(parts[0].shape[1:]),
    )
    for slot, tensor in placed:
        _view(wrapped.block, slot).copy_(tensor)
    torch.cat(parts, out=wrapped.tiles)
    return wrapped


def unwrap(packs: list[Any], text: Tensor) -> list[PackedBatch]:
    """`PackedBytes.packs` as views of `PackedBytes.text`, or of a copy of it."""
    return map_tensors(packs, lambda slot: _view(text, slot), leaf=_Slot)


def _view(block: Tensor, slot: _Slot) -> Tensor:
    num_bytes = slot.shape.numel() * slot.dtype.itemsize
    return block[slot.offset : slot.offset + num_bytes].view(slot.dtype).view(slot.shape)
