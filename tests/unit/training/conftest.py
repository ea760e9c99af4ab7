"""Process groups of one rank, and toy runs set up in them, which most tests of training need."""

from collections.abc import Callable, Iterator

import pytest

from megatron_vico.config.schema import RunConfig
from megatron_vico.parallel.groups import Groups, started
from megatron_vico.training.setup import Run, set_up


@pytest.fixture
def groups(single_process_groups: None) -> Iterator[Groups]:
    with started(RunConfig().parallel, seed=1, timeout_minutes=1) as groups:
        yield groups


@pytest.fixture
def start(stage_config: Callable[..., RunConfig], groups: Groups) -> Callable[..., Run]:
    """start(stage, **options): a toy run before its first step."""
    return lambda stage, **options: set_up(stage_config(stage, **options), groups)
