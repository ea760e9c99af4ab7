"""What the training tests share: a data set, and a model that was pretrained for two steps on it."""

from pathlib import Path

import pytest

from tests.training_runs import ToyData, make_toy_data, toy_config


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> ToyData:
    """Tokenizer and shards, made once."""
    return make_toy_data(tmp_path_factory.mktemp("toy_data"))


@pytest.fixture(scope="session")
def base_checkpoint(tmp_path_factory: pytest.TempPathFactory, toy_data: ToyData, single_process_groups: None) -> Path:
    """A pretrained toy, for the stages that start from one."""
    from megatron_vico.training.trainer import train

    folder = tmp_path_factory.mktemp("base")
    train(toy_config(toy_data, "pretrain", train_iters=2, save=str(folder)))
    return folder
