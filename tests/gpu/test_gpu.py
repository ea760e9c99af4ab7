"""Every check for a GPU works; without one in its small form."""

from collections.abc import Callable, Iterator

import pytest

from benchmarks.results import GOALS
from tests.gpu import kl_check
from tests.gpu.checks import CHECKS
from tests.gpu.machine import Figures, Machine


@pytest.fixture(scope="module")
def machine(single_process_groups: None) -> Iterator[Machine]:
    with Machine() as machine:
        yield machine


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_check(machine: Machine, check: Callable[[Machine], Figures]) -> None:
    assert check(machine)


def test_goals_are_of_figures_of_the_kl_heads_full_form(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its way through on a CPU, with a five-hundredth of the rows."""
    heads = kl_check._heads
    monkeypatch.setattr(machine, "on_gpu", True)
    monkeypatch.setattr(kl_check, "kl_blocks", None)  # they must not be what a GPU takes
    monkeypatch.setattr(
        kl_check,
        "_heads",
        lambda machine, rows, width, vocabulary: heads(
            machine, rows=rows // 512, width=64, vocabulary=1000
        ),
    )
    figures = kl_check.kl_head(machine)
    wanted = {what for check, what in GOALS if check == "kl_head" and "Liger" not in what}
    assert len(wanted) == len(GOALS) - 1
    assert wanted <= figures.keys()
