"""Every check for a GPU works; without one in its small form."""

import time
from collections.abc import Iterator

import pytest

from benchmarks.results import GOALS
from tests.gpu import kl_check, one
from tests.gpu.machine import Figures, Machine
from tests.gpu.one import check_named
from tests.gpu.run import LIMITS_S, shown

ON_A_GPU = ("8192", "32768", "textbook", "Liger", "MFU", "FP8")
"""Words of the figures that the small forms have not."""


@pytest.fixture(scope="module")
def machine(single_process_groups: None) -> Iterator[Machine]:
    with Machine() as machine:
        yield machine


@pytest.mark.parametrize("name", LIMITS_S)
def test_check(machine: Machine, name: str) -> None:
    machine.found = {}
    figures = check_named(name)(machine)
    goals = {what for check, what in GOALS if check == name}
    assert {what for what in goals if not any(word in what for word in ON_A_GPU)} <= figures.keys()
    assert figures


@pytest.mark.parametrize("result", ["FAIL", "hangs"])
def test_what_was_found_is_kept_though_the_rest_fails(
    result: str, single_process_groups: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(machine: Machine) -> Figures:
        machine.found["ms"] = 1.5
        raise {"FAIL": ValueError, "hangs": KeyboardInterrupt}[result]("no kernel")

    monkeypatch.setattr(one, "check_named", lambda name: check)
    line = one.report_of("step_8b_width")
    assert (line["result"], line["figures"]) == (result, {"ms": 1.5})
    if result == "FAIL":
        assert line["said"].startswith("ValueError: no kernel at test_gpu.py")
        assert shown(line | {"check": "step_8b_width", "seconds": 1}).endswith("; ms 1.5 [1 s]")


def test_milliseconds_leave_out_what_compiles(machine: Machine) -> None:
    """Which the first call does."""
    calls = []

    def action() -> None:
        if not calls:
            time.sleep(0.5)
        calls.append(1)

    assert machine.milliseconds(action) < 250
    assert len(calls) == 2


def test_goals_are_of_figures_of_the_kl_heads_full_form(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its way through on a CPU, with a five-hundredth of the rows."""
    heads, machine.found = kl_check._heads, {}
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
