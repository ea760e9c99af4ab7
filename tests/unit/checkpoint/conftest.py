"""Process groups of one rank for all checkpoints of a file."""

from collections.abc import Iterator

import pytest

from megatron_vico.config.schema import ParallelOptions
from megatron_vico.parallel.groups import Groups, started


@pytest.fixture(scope="module")
def groups(single_process_groups: None) -> Iterator[Groups]:
    with started(ParallelOptions(), seed=0, timeout_minutes=1) as found:
        yield found
