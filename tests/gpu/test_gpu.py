"""Every check for a GPU works; without one in its small form."""

from collections.abc import Iterator

import pytest

from benchmarks.results import GOALS
from tests.gpu import kl_check
from tests.gpu.machine import Machine
from tests.gpu.one import check_named
from tests.gpu.run import LIMITS_S

ON_A_GPU = ("8192", "32768", "textbook", "Liger", "MFU", "FP8")
"""Words of the figures that the small forms have not."""


@pytest.fixture(scope="module")
def machine(single_process_groups: None) -> Iterator[Machine]:
    with Machine() as machine:
        yield machine


@pytest.mark.parametrize("name", LIMITS_S)
def test_check(machine: Machine, name: str) -> None:
    figures = check_named(name)(machine)
    goals = {what for check, what in GOALS if check == name}
    assert {what for what in goals if not any(word in what for word in ON_A_GPU)} <= figures.keys()
    assert figures


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
    assert len(wanted) == sum(check == "kl_head" for check, _ in GOALS) - 1
    assert wanted <= figures.keys()
