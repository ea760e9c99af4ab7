"""Fixtures of all tests: the CPU stand-in, a world of one process, a data set, a first model."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from megatron_vico import cpu_stand_in
from megatron_vico.config.schema import RunConfig
from tests.training_runs import ToyData, make_toy_data, toy_config

os.environ.setdefault("OMP_NUM_THREADS", "1")
cpu_stand_in.install()
# No test is about time: on a busy machine an example may take longer than hypothesis allows.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first: a worker that began one last would keep the others waiting."""
    items.sort(key=lambda item: "unit" in item.path.parts)


@pytest.fixture(scope="session")
def single_process_groups() -> None:
    """A gloo world of one, with megatron-core's groups and seeds, for the whole session."""
    import torch
    from megatron.core import parallel_state, tensor_parallel

    gc.freeze()  # megatron-core collects garbage with each checkpoint: 0.2 s among all modules
    torch.set_num_threads(1)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> ToyData:
    """Tokenizer and shards of a few pictures."""
    return make_toy_data(tmp_path_factory.mktemp("toy_data"))


@pytest.fixture(scope="session")
def base_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, toy_data: ToyData, single_process_groups: None
) -> Path:
    """A toy model that was pretrained for two steps, for the stages that start from one."""
    from megatron_vico.training.trainer import train

    folder = tmp_path_factory.mktemp("base")
    train(toy_config(toy_data, "pretrain", train_iters=2, save=str(folder)))
    return folder


@pytest.fixture(scope="session")
def other_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, toy_data: ToyData, base_checkpoint: Path
) -> Path:
    """Another one with the same ViT: the router stage's reference must not be its policy."""
    from megatron_vico.training.trainer import train

    folder = tmp_path_factory.mktemp("other")
    start = {"pretrained_checkpoint": str(base_checkpoint), "save": str(folder)}
    trained = ("connector_4x", "language_model")
    train(toy_config(toy_data, "pretrain", train_iters=1, train_modules=trained, **start))
    return folder


@pytest.fixture(scope="session")
def stage_config(
    toy_data: ToyData, base_checkpoint: Path, other_checkpoint: Path
) -> Callable[..., RunConfig]:
    """stage_config(stage, **options): a toy run that starts from `base_checkpoint`, if it must."""

    def make(stage, **options):
        reference = other_checkpoint if stage == "router" else base_checkpoint
        start = {
            "pretrained_checkpoint": str(base_checkpoint),
            "reference_load": str(reference),
        }
        return toy_config(toy_data, stage, **({} if stage == "pretrain" else start) | options)

    return make
