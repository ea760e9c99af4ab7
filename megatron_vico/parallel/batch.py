"""One optimizer step's packs on every rank of a model replica: read once, text to all, each tile to
one rank.

The first rank of a replica reads; the others get the packs without tiles by broadcast, and the
tiles that they encode from it. An error of its loader is an error on all ranks, so that none waits
for the others.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vico.data.load import packed_bytes
from megatron_vico.data.samples import PackedBatch
from megatron_vico.errors import ConfigError, SampleError, WorkerError
from megatron_vico.parallel.groups import Groups
from megatron_vico.parallel.tile_parallel import TileShare, share_tiles

LoaderError = SampleError | ConfigError | WorkerError


@dataclass(frozen=True, kw_only=True, eq=False)
class StepBatch:
    """The packs of one replica for one optimizer step, and the tiles of them that this rank
    encodes."""

    packs: tuple[PackedBatch, ...]
    """All packs, on the CPU, the same on every rank of the replica; their `tiles` are empty."""

    tiles: Tensor
    """[n, 3, S, S] uint8, this rank's run of the step's tiles."""

    share: TileShare
    """Which rank has which tiles."""


def share_step(
    packs: Sequence[PackedBatch] | LoaderError | None, *, groups: Groups, whole_images: bool = False
) -> StepBatch:
    """Spread a step over the ranks of the replica; called by every rank.

    Args:
        packs: on the first rank of the replica the packs, or why there are none; elsewhere None.
        groups: process groups.
        whole_images: keep the tiles of an image on one rank.

    Returns:
        This rank's view of the step.

    Raises:
        SampleError, ConfigError, WorkerError: on every rank, if the first one was given it.
    """
    if groups.replica.size() == 1:
        if isinstance(packs, LoaderError):
            raise packs
        assert packs is not None
        share = _share(packs, groups, whole_images)
        return StepBatch(
            packs=_without_tiles(packs), tiles=_run(packs, share.mine, groups), share=share
        )
    header = _broadcast_header(packs, groups)
    block = (
        header["block"]
        if groups.replica.rank() == 0
        else torch.empty(header["num_bytes"], dtype=torch.uint8)
    )
    block = block.to(groups.device)
    torch.distributed.broadcast(block, group=groups.replica, group_src=0)
    # Back to the CPU, where lengths and positions are worked out; it happens once, before the step
    # begins.
    received = tuple(
        packed_bytes.unwrap(packed_bytes.Parcel(block=block.cpu(), batches=header["batches"]))
    )
    share = _share(received, groups, whole_images)
    tiles = _scatter_tiles(packs, share, header["tile_shape"], groups)
    return StepBatch(packs=received, tiles=tiles, share=share)


class SharedBatches(Iterable[StepBatch]):
    """Every rank's batches: those that the replica's first rank reads, spread over its ranks."""

    def __init__(
        self,
        batches: Iterable[Sequence[PackedBatch]] | None,
        *,
        num_steps: int,
        groups: Groups,
        whole_images: bool = False,
    ) -> None:
        """Args: batches: the loader, on the replica's first rank; num_steps: how many steps are
        left, on every rank."""
        assert (batches is not None) == (groups.replica.rank() == 0), (
            "the first rank of a replica reads"
        )
        self._batches, self._num_steps = batches, num_steps
        self._groups, self._whole_images = groups, whole_images

    def __iter__(self) -> Iterator[StepBatch]:
        """One StepBatch a step; raises a LoaderError on every rank of a replica whose reader met
        one."""
        reading = iter(self._batches) if self._batches is not None else None
        for _ in range(self._num_steps):
            packs: Sequence[PackedBatch] | LoaderError | None = None
            try:
                packs = next(reading) if reading is not None else None
            except (SampleError, ConfigError, WorkerError) as error:
                packs = error
            yield share_step(packs, groups=self._groups, whole_images=self._whole_images)


def _broadcast_header(
    packs: Sequence[PackedBatch] | LoaderError | None, groups: Groups
) -> dict[str, Any]:
    """What is needed to receive the packs; on the sending rank also their block of bytes."""
    sent: list[Any] = [None]
    block = None
    if groups.replica.rank() == 0:
        assert packs is not None
        if isinstance(packs, LoaderError):
            sent = [{"error": packs}]
        else:
            wrapped = packed_bytes.wrap(list(_without_tiles(packs)))
            block = wrapped.block
            shape = tuple(packs[0].tiles.shape[1:])
            sent = [{"batches": wrapped.batches, "num_bytes": block.numel(), "tile_shape": shape}]
    torch.distributed.broadcast_object_list(
        sent, group=groups.replica, group_src=0, device=groups.device
    )
    header: dict[str, Any] = sent[0]
    if "error" in header:
        raise header["error"]
    return header | {"block": block}


def _scatter_tiles(
    packs: Sequence[PackedBatch] | LoaderError | None,
    share: TileShare,
    shape: tuple[int, ...],
    groups: Groups,
) -> Tensor:
    """Each rank's run of tiles; the runs are cut and sent one after the other, so that only one is
    held twice."""
    if groups.replica.rank() == 0:
        assert packs is not None
        assert not isinstance(packs, LoaderError)
        for rank in range(1, groups.replica.size()):
            run = _run(packs, share.of(rank), groups).to(groups.device)
            if len(run):
                torch.distributed.send(run, group=groups.replica, group_dst=rank)
        return _run(packs, share.mine, groups).to(groups.device)
    num_tiles = share.mine.stop - share.mine.start
    mine = torch.empty(num_tiles, *shape, dtype=torch.uint8, device=groups.device)
    if num_tiles:
        torch.distributed.recv(mine, group=groups.replica, group_src=0)
    return mine


def _share(packs: Sequence[PackedBatch], groups: Groups, whole_images: bool) -> TileShare:
    per_image = [count for pack in packs for count in pack.tiles_per_image]
    units = per_image if whole_images else [1] * sum(per_image)
    return share_tiles(units, num_ranks=groups.replica.size(), rank=groups.replica.rank())


def _run(packs: Sequence[PackedBatch], run: slice, groups: Groups) -> Tensor:
    """Tiles run.start to run.stop of a step; page-locked where a GPU will take them, so that
    compute goes on meanwhile.

    They come from memory that workers share and are copied once, here.
    """
    parts, first = [], 0
    for pack in packs:
        parts.append(pack.tiles[max(run.start - first, 0) : max(run.stop - first, 0)])
        first += len(pack.tiles)
    whole = parts[0].new_empty(
        run.stop - run.start, *parts[0].shape[1:], pin_memory=groups.device.type == "cuda"
    )
    return torch.cat(parts, out=whole)


def _without_tiles(packs: Sequence[PackedBatch]) -> tuple[PackedBatch, ...]:
    return tuple(dataclasses.replace(pack, tiles=pack.tiles[:0].clone()) for pack in packs)
