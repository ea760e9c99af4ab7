"""Process groups of one rank, which most tests of training need."""

from collections.abc import Iterator

import pytest

from megatron_vico.config.schema import RunConfig
from megatron_vico.parallel.groups import Groups, started


@pytest.fixture
def groups(single_process_groups: None) -> Iterator[Groups]:
    with started(RunConfig().parallel, seed=1, timeout_minutes=1) as groups:
        yield groups
