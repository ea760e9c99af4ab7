"""What `vico train` does before it trains."""

import os

import pytest

from megatron_vico.cli import train
from megatron_vico.config.schema import RunConfig
from megatron_vico.training import trainer
from megatron_vico.training.stop import Outcome

CONNECTIONS, ALLOCATOR = "CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF"


def test_cuda_is_told_how_to_overlap_and_allocate_unless_the_user_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def trained(cfg: RunConfig) -> Outcome:
        seen.append((os.environ[CONNECTIONS], os.environ[ALLOCATOR]))
        return "ended"

    monkeypatch.setattr(trainer, "train", trained)
    for mine in ({}, {CONNECTIONS: "8"}):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", mine)
            assert train.main([]) == 0
    assert seen == [("1", "expandable_segments:True"), ("8", "expandable_segments:True")]
