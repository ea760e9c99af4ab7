"""Starts a run's process groups: Megatron's for the language model, and the encoder's."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vico.config.layout import launched_world_size
from megatron_vico.config.schema import ParallelOptions


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The process groups that everything below the entry points is handed."""

    language: ProcessGroupCollection
    encoder: ProcessGroupCollection
    """Groups of the vision encoder: data-parallel over all ranks (it is never split), all else of
    one rank."""

    replica: torch.distributed.ProcessGroup
    """Ranks that share one model replica (tensor x context x pipeline) and so work on the same
    packs; tensor ranks are neighbours in it, and the ranks of the first pipeline stage come first.
    """

    hosts: torch.distributed.ProcessGroup
    """The ranks of `replica`, for what goes from host to host: it waits for no device."""

    device: torch.device

    @property
    def data_parallel(self) -> torch.distributed.ProcessGroup:
        """The ranks of all replicas that have this rank's part of the model."""
        return self.language.dp

    @property
    def dp_rank(self) -> int:
        """This replica's index among those that read different packs."""
        return self.data_parallel.rank()

    @property
    def dp_size(self) -> int:
        """How many replicas read different packs."""
        return self.data_parallel.size()

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return torch.distributed.get_rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has response rows and a vocabulary head."""
        return self.language.pp.rank() == self.language.pp.size() - 1

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's loss enters the sum over ranks: others have none, or the same."""
        return self.is_last_stage and self.language.tp.rank() == 0


@contextmanager
def started(options: ParallelOptions, *, seed: int, timeout_minutes: int) -> Iterator[Groups]:
    """torch.distributed and Megatron's groups, from the launcher's environment or for one process.

    Groups that a caller had started before are used and left running; what was started here ends
    with the context, unless that ends with an error. `seed` is of initialisation and dropout, as
    Megatron's.
    """
    owned = not torch.distributed.is_initialized()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
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
        lay_out(options, timeout_minutes=timeout_minutes)
    yield current_groups(seed=seed, device=device, timeout_minutes=timeout_minutes)
    # Not after an error: closing NCCL's groups may wait for ranks that never come, and the process
    # ends anyway.
    if owned:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def lay_out(options: ParallelOptions, *, timeout_minutes: int) -> None:
    """Initialise megatron-core with a layout; called by every rank of torch.distributed."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=options.tensor_model_parallel_size,
        pipeline_model_parallel_size=options.pipeline_model_parallel_size,
        context_parallel_size=options.context_parallel_size,
        expert_model_parallel_size=options.expert_model_parallel_size,
        expert_tensor_parallel_size=options.expert_tensor_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,  # twins of all groups, which nothing here uses
    )


def current_groups(*, seed: int, device: torch.device, timeout_minutes: int) -> Groups:
    """The groups of the layout that megatron-core has been initialised with, and our own.

    Called by every rank; the arguments are those of `started`.
    """
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    language = ProcessGroupCollection.use_mpu_process_groups()
    timeout = timedelta(minutes=timeout_minutes)
    replica = _replica_group(language, timeout=timeout)
    # NCCL makes a communicator at the first call, to which all must come: not to the first tiles.
    torch.distributed.all_reduce(torch.zeros(1, device=device), group=replica)
    return Groups(
        language=language,
        encoder=_encoder_groups(),
        replica=replica,
        hosts=(
            _replica_group(language, timeout=timeout, backend="gloo")
            if device.type == "cuda"
            else replica
        ),
        device=device,
    )


def _replica_group(
    language: ProcessGroupCollection, **options: Any
) -> torch.distributed.ProcessGroup:
    # megatron-core has none; its rank order is tensor, context, data, pipeline.
    tensor, context, data, pipeline = (
        getattr(language, name).size() for name in ("tp", "cp", "dp", "pp")
    )
    ranks = torch.arange(tensor * context * data * pipeline).view(pipeline, data, context, tensor)
    coordinates = tuple(getattr(language, name).rank() for name in ("pp", "dp", "cp", "tp"))
    assert int(ranks[coordinates]) == torch.distributed.get_rank(), (
        "megatron-core orders its ranks in another way"
    )
    # Every rank makes every group, as torch asks for.
    groups = [
        torch.distributed.new_group(ranks[:, index].flatten().tolist(), **options)
        for index in range(data)
    ]
    return groups[coordinates[1]]


_OF_ONE_RANK = "tp pp cp ep mp embd pos_embd tp_cp tp_ep_pp expt_tp tp_ep"
_OF_ALL_RANKS = "dp dp_cp expt_dp intra_dp_cp intra_expt_dp intra_dist_opt"


def _encoder_groups() -> ProcessGroupCollection:
    world = torch.distributed.group.WORLD
    one = torch.distributed.new_group(
        [torch.distributed.get_rank()], use_local_synchronization=True
    )
    groups = ProcessGroupCollection()
    for name in _OF_ONE_RANK.split():
        setattr(groups, name, one)
    for name in _OF_ALL_RANKS.split():
        setattr(groups, name, world)
    return groups
