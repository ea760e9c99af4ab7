"""One step's packs on every rank of a replica: read once, text to all, each tile to one rank.

The first rank of a replica reads; the others get the packs by broadcast, and the tiles that they
encode from it. An error of its loader is an error on all ranks, so that none waits for the others.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_vico.data.load.packed_bytes import PackedBytes, unwrap
from megatron_vico.data.samples import PackedBatch
from megatron_vico.errors import ConfigError, ReadingStopped, SampleError, WorkerError
from megatron_vico.models.to_device import to_device
from megatron_vico.parallel.groups import Groups
from megatron_vico.parallel.tile_parallel import TileSplit, split_tiles

LoaderError = SampleError | ConfigError | WorkerError | ReadingStopped


@dataclass(frozen=True, kw_only=True, eq=False)
class StepBatch:
    """The packs of one replica for one step, and the tiles of them that this rank encodes."""

    packs: tuple[PackedBatch, ...]
    """All packs, on the CPU, the same on every rank of the replica."""

    tiles: Tensor
    """[n, 3, S, S] uint8, this rank's run of the step's tiles."""

    split: TileSplit
    """Which rank has which tiles."""


def share_step(
    blocks: Sequence[PackedBytes] | LoaderError | None,
    *,
    groups: Groups,
    whole_images: bool = False,
) -> StepBatch:
    """Spread a step over the ranks of the replica; called by every rank.

    Args:
        blocks: on the first rank of the replica the packs, or why there are none, which is raised
            on every rank; elsewhere None.
        whole_images: keep the tiles of an image on one rank.
    """
    headers = _broadcast_headers(blocks, groups)
    read = [] if blocks is None or isinstance(blocks, LoaderError) else list(blocks)
    text_bytes = [header.text_bytes for header in headers]
    text = (
        torch.cat([block.text for block in read])
        if read
        else torch.empty(sum(text_bytes), dtype=torch.uint8)
    )
    if groups.replica.size() > 1:
        # On the CPU, where lengths and positions are worked out; no device is waited for.
        torch.distributed.broadcast(text, group=groups.hosts, group_src=0)
    texts = text.split(text_bytes)
    packs = tuple(
        pack
        for header, part in zip(headers, texts, strict=True)
        for pack in unwrap(header.packs, part)
    )
    split = split_step(packs, groups=groups, whole_images=whole_images)
    return StepBatch(
        packs=packs, tiles=_scatter_tiles(read, split, headers[0].tile_shape, groups), split=split
    )


def split_step(
    packs: Sequence[PackedBatch], *, groups: Groups, whole_images: bool = False
) -> TileSplit:
    """Which rank of the replica encodes which tiles of a step; see `share_step`."""
    per_image = [count for pack in packs for count in pack.tiles_per_image]
    return split_tiles(
        per_image if whole_images else [1] * sum(per_image),
        num_ranks=groups.replica.size(),
        rank=groups.replica.rank(),
    )


def shared_batches(
    steps: Iterable[Sequence[PackedBytes]] | None,
    *,
    num_steps: int,
    groups: Groups,
    whole_images: bool = False,
) -> Iterator[StepBatch]:
    """Every rank's part of `num_steps` steps; see `share_step`.

    `steps` is the loader, on the replica's first rank; elsewhere None. What it meets is raised on
    every rank.
    """
    assert (steps is not None) == (groups.replica.rank() == 0), "the replica's first rank reads"
    reading = iter(steps) if steps is not None else None
    for _ in range(num_steps):
        blocks: Sequence[PackedBytes] | LoaderError | None = None
        try:
            blocks = next(reading) if reading is not None else None
        except (SampleError, ConfigError, WorkerError, ReadingStopped) as error:
            blocks = error
        yield share_step(blocks, groups=groups, whole_images=whole_images)


def _broadcast_headers(
    blocks: Sequence[PackedBytes] | LoaderError | None, groups: Groups
) -> list[PackedBytes]:
    """The step's blocks without their bytes, which is what a rank must know to receive those."""
    sent: list[list[PackedBytes] | LoaderError | None] = [None]
    if isinstance(blocks, LoaderError):
        sent = [blocks]
    elif blocks is not None:
        sent = [[replace(block, block=block.block.new_empty(0)) for block in blocks]]
    if groups.replica.size() > 1:
        torch.distributed.broadcast_object_list(sent, group=groups.hosts, group_src=0)
    (found,) = sent
    if isinstance(found, LoaderError):
        raise found
    assert found is not None, "the first rank of a replica reads"
    return found


def _scatter_tiles(
    blocks: Sequence[PackedBytes], split: TileSplit, shape: tuple[int, ...], groups: Groups
) -> Tensor:
    """Each rank's run of tiles, cut and sent one after the other: only one is held twice."""
    if groups.replica.rank() == 0:
        for rank in range(1, groups.replica.size()):
            run = to_device(_run(blocks, split.of(rank), groups), groups.device)
            _carry(torch.distributed.isend, run, rank, groups)
        return _run(blocks, split.own, groups)
    num_tiles = split.own.stop - split.own.start
    run = torch.empty(num_tiles, *shape, dtype=torch.uint8, device=groups.device)
    _carry(torch.distributed.irecv, run, 0, groups)
    return run


def _carry(call: Callable[..., object], run: Tensor, peer: int, groups: Groups) -> None:
    # As a batch: NCCL then takes the replica's communicator; a send of its own would have one made
    # for each pair of ranks.
    if len(run):
        op = torch.distributed.P2POp(call, run, group=groups.replica, group_peer=peer)
        for request in torch.distributed.batch_isend_irecv([op]):
            request.wait()


def _run(blocks: Sequence[PackedBytes], run: slice, groups: Groups) -> Tensor:
    """Tiles run.start to run.stop of a step; page-locked where a GPU takes them while it computes.

    They come from memory that workers share and are copied once, here.
    """
    parts, first = [], 0
    for block in blocks:
        parts.append(block.tiles[max(run.start - first, 0) : max(run.stop - first, 0)])
        first += len(block.tiles)
    whole = parts[0].new_empty(
        run.stop - run.start, *parts[0].shape[1:], pin_memory=groups.device.type == "cuda"
    )
    return torch.cat(parts, out=whole)
