"""What the run's own process groups are made with."""

from datetime import timedelta

import pytest
import torch
from megatron.core import parallel_state

from megatron_vico.config.schema import ParallelOptions, TrainingOptions
from megatron_vico.parallel.groups import current_groups, started
from tests.distributed.launch import on_ranks


def test_the_replicas_ranks_wait_as_long_as_the_run_says(single_process_groups: None) -> None:
    """Left to torch, NCCL would end a run after ten minutes whatever --distributed-timeout-minutes
    says."""
    assert TrainingOptions().distributed_timeout_minutes >= 30  # a rank may write 100 GB alone
    device = torch.device("cpu")
    with started(ParallelOptions(), seed=1, timeout_minutes=3):
        groups = current_groups(seed=1, device=device, timeout_minutes=7)
    for group in (groups.replica, groups.hosts):
        assert group._get_backend(device).options._timeout == timedelta(minutes=7)


def gloo_twins() -> list[str]:
    with started(ParallelOptions(), seed=1, timeout_minutes=1):
        found = vars(parallel_state).items()
    return [name for name, group in found if name.endswith("_GLOO") and group is not None]


@pytest.mark.slow
def test_megatrons_groups_have_no_gloo_twins() -> None:
    """Nothing here uses them, and at 128 ranks they make a slow start."""
    assert any(name.endswith("_GROUP_GLOO") for name in vars(parallel_state))
    assert on_ranks(gloo_twins, num_ranks=1) == [[]]
