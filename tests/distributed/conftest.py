"""Launches that several files of tests look at."""

import json
from typing import Any

import pytest

from tests.distributed.launch import launch


@pytest.fixture(scope="session")
def model_errors() -> list[dict[str, Any]]:
    """What the main rank of tests/distributed/model_ranks.py found, case by case."""
    printed = launch("model_ranks.py", num_processes=4)
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
