"""Writing behind: in order, one at a time, and no failure is lost."""

import threading
from collections.abc import Callable

import pytest

from megatron_vico.convert.write_behind import write_behind


def test_actions_run_in_order_beside_the_caller() -> None:
    done: list[int] = []
    may_end = threading.Event()

    def first() -> None:
        assert may_end.wait(timeout=60)
        done.append(1)

    with write_behind() as behind:
        behind(first)
        assert done == []  # the caller goes on
        may_end.set()
        for number in range(2, 6):
            behind(lambda number=number: done.append(number))
    assert done == [1, 2, 3, 4, 5]


def full() -> None:
    raise OSError("No space left on device")


def write_all(*actions: Callable[[], object], fails: bool = False) -> None:
    with write_behind() as behind:
        for action in actions:
            behind(action)
        if fails:
            raise KeyError


@pytest.mark.parametrize("num_more", [0, 1])
def test_a_failure_is_raised_at_the_next_action_or_at_the_end(num_more: int) -> None:
    done: list[int] = []
    with pytest.raises(OSError, match="No space left"):
        write_all(full, *[lambda: done.append(1)] * num_more)
    assert done == []


def test_the_callers_own_failure_comes_first() -> None:
    with pytest.raises(KeyError):
        write_all(full, fails=True)
