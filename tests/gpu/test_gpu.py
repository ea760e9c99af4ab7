"""Every check for a GPU works; without one in its small form."""

from collections.abc import Callable, Iterator

import pytest

from tests.gpu.__main__ import main
from tests.gpu.checks import CHECKS
from tests.gpu.machine import Machine


@pytest.fixture(scope="module")
def machine(single_process_groups: None) -> Iterator[Machine]:
    with Machine() as machine:
        yield machine


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_check(machine: Machine, check: Callable[[Machine], str]) -> None:
    assert check(machine)


def test_a_failing_check_stops_no_other(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    single_process_groups: None,
) -> None:
    def broken(machine: Machine) -> str:
        raise RuntimeError("no\nkernel")

    monkeypatch.setitem(CHECKS, "versions", broken)
    assert main(["versions", "wide_product"]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("FAIL versions     RuntimeError: no kernel at test_gpu.py:")
    assert second.startswith("ok   wide_product largest error")
    assert main(["version"]) == 2
    assert "no such check: version; there are versions, groups" in capsys.readouterr().out
