"""Starts the process groups of a run: Megatron's for the language model, and those of the vision encoder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vico.config.schema import ParallelOptions


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The process groups that everything below the entry points is handed."""

    language: ProcessGroupCollection
    """Megatron's groups of the language model."""

    encoder: ProcessGroupCollection
    """Groups of the vision encoder: data-parallel over all ranks (it is never split), all else of one rank."""

    data_parallel: torch.distributed.ProcessGroup
    """Ranks that read different packs."""

    device: torch.device
    """Where this rank computes."""

    @property
    def dp_rank(self) -> int:
        """This rank's place among those that read different packs."""
        return self.data_parallel.rank()

    @property
    def dp_size(self) -> int:
        """How many ranks read different packs."""
        return self.data_parallel.size()

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return torch.distributed.get_rank() == 0


def launched_world_size() -> int:
    """World size as the launcher (torchrun, srun) set it; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def started(options: ParallelOptions, *, seed: int, timeout_minutes: int) -> Iterator[Groups]:
    """torch.distributed and Megatron's groups, from the launcher's environment or for one process.

    Groups that a caller had started before are used and left running.

    Args:
        options: the layout; `config/validate.py` has checked that it fits the world size.
        seed: seeds initialisation and dropout, as Megatron does.
        timeout_minutes: how long a collective may wait before the run is ended.

    Yields:
        The groups of this rank; what was started here ends with the context.
    """
    owned = not torch.distributed.is_initialized()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if owned:
        launched = "RANK" in os.environ
        torch.distributed.init_process_group(
            "nccl" if on_gpu else "gloo",
            timeout=timedelta(minutes=timeout_minutes),
            store=None if launched else torch.distributed.HashStore(),
            rank=int(os.environ.get("RANK", "0")),
            world_size=launched_world_size(),
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=options.tensor_model_parallel_size,
            pipeline_model_parallel_size=options.pipeline_model_parallel_size,
            context_parallel_size=options.context_parallel_size,
            expert_model_parallel_size=options.expert_model_parallel_size,
            expert_tensor_parallel_size=options.expert_tensor_parallel_size,
        )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    language = ProcessGroupCollection.use_mpu_process_groups()
    try:
        yield Groups(language=language, encoder=_encoder_groups(), data_parallel=language.dp, device=device)
    finally:
        if owned:
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()


def _encoder_groups() -> ProcessGroupCollection:
    world = torch.distributed.group.WORLD
    one = torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)
    groups = ProcessGroupCollection()
    for name in ("tp", "pp", "cp", "ep", "mp", "embd", "pos_embd", "tp_cp", "tp_ep_pp", "expt_tp", "tp_ep"):
        setattr(groups, name, one)
    for name in ("dp", "dp_cp", "expt_dp", "intra_dp_cp", "intra_expt_dp", "intra_dist_opt"):
        setattr(groups, name, world)
    return groups
