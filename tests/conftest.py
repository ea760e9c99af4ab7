"""Fixtures shared by all tests: the CPU stand-in and a world of one process."""

import os

import pytest

from megatron_vico.parallel import cpu_stand_in

os.environ.setdefault("OMP_NUM_THREADS", "1")
cpu_stand_in.install()


@pytest.fixture(scope="session")
def single_process_groups() -> None:
    """A gloo world of one, with megatron-core's groups and seeds, shared by the whole test session."""
    import torch
    from megatron.core import parallel_state, tensor_parallel

    torch.set_num_threads(1)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
