"""Process groups of one rank, and toy runs set up in them, which most tests of training need."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vico.config.schema import RunConfig
from megatron_vico.parallel.groups import Groups, started
from megatron_vico.training.setup import Run, set_up
from megatron_vico.training.trainer import train


@pytest.fixture
def groups(single_process_groups: None) -> Iterator[Groups]:
    with started(RunConfig().parallel, seed=1, timeout_minutes=1) as groups:
        yield groups


@pytest.fixture
def start(stage_config: Callable[..., RunConfig], groups: Groups) -> Callable[..., Run]:
    """start(stage, **options): a toy run before its first step."""
    return lambda stage, **options: set_up(stage_config(stage, **options), groups)


@pytest.fixture(scope="session")
def plain_run(
    stage_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """plain_run(stage): the --save folder of a run that others are to equal, and its options."""
    folder = tmp_path_factory.mktemp("plain")

    @functools.cache
    def run(stage: str) -> tuple[Path, dict[str, Any]]:
        options: dict[str, Any] = {"train_iters": 5}
        if stage == "pretrain":  # the only one that trains the ViT
            options["drop_path_rate"] = 0.3
        train(stage_config(stage, **options, save=str(folder / stage)))
        return folder / stage, options

    return run
