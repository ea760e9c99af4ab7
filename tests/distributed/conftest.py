"""Launches that several files of tests look at."""

from typing import Any

import pytest

from tests.distributed.launch import on_ranks
from tests.distributed.model_ranks import found_cases


@pytest.fixture(scope="session")
def model_errors() -> list[dict[str, Any]]:
    """What tests/distributed/model_ranks.py found, case by case."""
    return on_ranks(found_cases, num_ranks=4)[0]
