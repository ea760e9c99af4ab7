"""Packs with their tiles, as tests look at them; the product keeps the two apart."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_vico.data.load.packed_bytes import PackedBytes, unwrap, wrap
from megatron_vico.data.samples import PackedBatch


@dataclass(frozen=True, kw_only=True, eq=False)
class WholePack(PackedBatch):
    """A pack and its tiles."""

    tiles: Tensor
    """[N, 3, S, S] uint8."""


def whole_packs(blocks: Sequence[PackedBytes]) -> list[WholePack]:
    """What a loader gives for a step."""
    return [
        WholePack(**_fields(pack), tiles=tiles)
        for block in blocks
        for pack, tiles in _with_tiles(block)
    ]


def as_blocks(packs: Sequence[WholePack]) -> list[PackedBytes]:
    """What a loader would give for these packs."""
    return [
        wrap(
            [PackedBatch(**{k: v for k, v in _fields(pack).items() if k != "tiles"})],
            [pack.tiles.numpy()],
        )
        for pack in packs
    ]


def _with_tiles(block: PackedBytes) -> list[tuple[PackedBatch, Tensor]]:
    packs = unwrap(block.packs, block.text)
    tiles = block.tiles.split([pack.num_tiles for pack in packs])
    return list(zip(packs, tiles, strict=True))


def _fields(pack: PackedBatch) -> dict[str, object]:
    return {field.name: getattr(pack, field.name) for field in dataclasses.fields(pack)}
