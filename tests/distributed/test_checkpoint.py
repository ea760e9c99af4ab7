"""Training checkpoints of two data-parallel ranks: exact resume, also by one process, and a disk
that is full."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vico.checkpoint import run_folder
from megatron_vico.config.schema import ParallelOptions
from megatron_vico.parallel.groups import started
from tests.checkpoint_runs import make_training
from tests.distributed.launch import launch

KINDS = [
    (optimizer, dtype) for optimizer in ("replicated", "sharded") for dtype in ("fp32", "bf16")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests/distributed/run_checkpoint.py wrote with two ranks."""
    path = tmp_path_factory.mktemp("checkpoints")
    launch("run_checkpoint.py", path, num_processes=2)
    return path


def found_by(folder: Path, name: str) -> list[dict[str, Any]]:
    """What each rank wrote."""
    return [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("optimizer", "dtype"), KINDS)
def test_resume_is_exact(optimizer: str, dtype: str, folder: Path) -> None:
    zero, one = found_by(folder, f"{optimizer}-{dtype}")
    for rank in (zero, one):
        assert rank["trainer_state"] == {"iteration": 2}
        for name, tensor in rank["whole"].items():
            assert torch.equal(rank["resumed"][name], tensor), name
            assert torch.equal(zero["whole"][name], tensor), name
    assert not torch.equal(
        zero["whole"]["encoder.vit.class_token"], zero["loaded"]["encoder.vit.class_token"]
    )


@pytest.mark.parametrize(("optimizer", "dtype"), KINDS)
def test_one_process_reads_what_two_wrote(
    optimizer: str, dtype: str, folder: Path, single_process_groups: None
) -> None:
    expected = found_by(folder, f"{optimizer}-{dtype}")[0]["loaded"]
    with started(ParallelOptions(), seed=1, timeout_minutes=1) as groups:
        one = make_training("toy-6b", groups=groups, seed=5, dtype=dtype, optimizer=optimizer)
        one.load(folder / f"{optimizer}-{dtype}")
        assert all(torch.equal(tensor, expected[name]) for name, tensor in one.tensors().items())
        one.step(3)  # the moments have to fit the parameters


def test_every_rank_is_told_of_a_full_disk(folder: Path) -> None:
    for rank in found_by(folder, "full"):
        in_tensors, in_pointer = rank["told"]
        assert "last good checkpoint is" in in_tensors
        assert "iter_0000001" in in_tensors
        assert "No space left on device" in in_pointer
        assert rank["latest"] == 1
        assert "iter_0000001" in rank["left"]
        assert not [name for name in rank["left"] if name.endswith(".incomplete")]
    assert run_folder.has_checkpoint(folder / "full")
