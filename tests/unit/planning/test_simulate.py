"""The simulated pipeline against formulas and an independent table."""

import pytest

from megatron_vico.planning.simulate import Pipeline, StageTimes, step_seconds

RHO = 1.39
"""Reference over policy forward, 75 % visual tokens of which half of the tiles are compressed."""


def overhead(stages: int, packs: int, chunks: int, *, reference: float = RHO) -> float:
    """Time beyond that without a bubble, as a fraction."""
    times = [StageTimes(reference=reference, forward=1.0, backward=2.0)] * stages
    found = step_seconds(times, Pipeline(packs=packs, chunks=chunks))
    return found / (packs * (reference + 3.0)) - 1


@pytest.mark.parametrize(
    ("stages", "packs", "expected"),
    [
        (8, 32, 0.169),
        (8, 16, 0.338),
        (12, 32, 0.265),
        (16, 32, 0.362),
        (16, 64, 0.181),
        (8, 8, 0.676),
        (16, 16, 0.72),
    ],
)
def test_without_interleaving(stages: int, packs: int, expected: float) -> None:
    """Reference and policy without a barrier between, by another simulator (rounded to 0.1 %); the
    fill is paid once, as the longer of the two forward passes. Measured: within 0.003."""
    assert overhead(stages, packs, 1) == pytest.approx(expected, abs=0.005)
    assert overhead(stages, packs, 1) == pytest.approx(
        (stages - 1) * (RHO + 2) / (packs * (RHO + 3)), abs=1e-9
    )


@pytest.mark.parametrize(
    ("stages", "packs", "chunks", "expected"),
    [(8, 32, 4, 0.042), (8, 16, 4, 0.084), (16, 32, 3, 0.121), (16, 64, 3, 0.06)],
)
def test_interleaving_divides_the_overhead(
    stages: int, packs: int, chunks: int, expected: float
) -> None:
    """By formula; measured: within 0.01."""
    assert overhead(stages, packs, chunks) == pytest.approx(expected, abs=0.01)


def test_one_stage_has_no_bubble_and_a_slow_stage_sets_the_pace() -> None:
    assert overhead(1, 4, 1) == 0.0
    slow = StageTimes(reference=0.0, forward=2.0, backward=4.0)
    fast = StageTimes(reference=0.0, forward=1.0, backward=2.0)
    assert step_seconds([slow, fast], Pipeline(packs=10)) == 61.0  # a wait of 1 s at the start
    assert step_seconds([fast, fast], Pipeline(packs=2, hop_s=0.5)) > step_seconds(
        [fast, fast], Pipeline(packs=2)
    )
