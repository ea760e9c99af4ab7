"""Every check for a GPU works; without one in its small form."""

from collections.abc import Callable, Iterator

import pytest

from tests.gpu.checks import CHECKS
from tests.gpu.machine import Figures, Machine


@pytest.fixture(scope="module")
def machine(single_process_groups: None) -> Iterator[Machine]:
    with Machine() as machine:
        yield machine


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_check(machine: Machine, check: Callable[[Machine], Figures]) -> None:
    assert check(machine)
