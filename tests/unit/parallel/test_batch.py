"""How a step's tiles leave the rank that reads."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from megatron_vico.parallel import batch
from megatron_vico.parallel.tile_parallel import split_tiles


def test_tiles_go_in_batches_through_the_replicas_communicator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A send outside of a batch has NCCL make a communicator for its two ranks."""
    sent = []
    for name in ("send", "recv"):
        monkeypatch.delattr(torch.distributed, name)
    monkeypatch.setattr(
        torch.distributed,
        "P2POp",
        lambda call, run, *, group, group_peer: (call.__name__, run.flatten().tolist(), group_peer),
    )
    monkeypatch.setattr(torch.distributed, "batch_isend_irecv", lambda ops: sent.extend(ops) or [])
    replica = SimpleNamespace(rank=lambda: 0, size=lambda: 4)
    groups = SimpleNamespace(replica=replica, device=torch.device("cpu"))
    blocks = [
        SimpleNamespace(tiles=torch.arange(start, end, dtype=torch.uint8).view(-1, 1, 1, 1))
        for start, end in ((0, 2), (2, 5))
    ]
    split = split_tiles([2, 2, 1], num_ranks=4, rank=0)
    own = batch._scatter_tiles(blocks, split, (1, 1, 1), groups)
    everyones = [own.flatten().tolist(), *(tiles for _, tiles, _ in sent)]
    assert [*itertools.chain(*everyones)] == [0, 1, 2, 3, 4]
    assert {call for call, _, _ in sent} == {"isend"}
    assert len(sent) < 3, "a rank without tiles is sent nothing"
