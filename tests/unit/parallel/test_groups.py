"""What the run's own process groups are made with."""

from datetime import timedelta

import torch

from megatron_vico.config.schema import ParallelOptions
from megatron_vico.parallel.groups import current_groups, started


def test_the_replicas_ranks_wait_as_long_as_the_run_says(single_process_groups: None) -> None:
    """Left to torch, NCCL would end a run after ten minutes whatever --distributed-timeout-minutes
    says."""
    device = torch.device("cpu")
    with started(ParallelOptions(), seed=1, timeout_minutes=3):
        groups = current_groups(seed=1, device=device, timeout_minutes=7)
    for group in (groups.replica, groups.hosts):
        assert group._get_backend(device).options._timeout == timedelta(minutes=7)
