"""Packs to ranks: every sample once, never worse than dealing, close to the mean where costs
differ, equal counts where ranks wait for each other."""

import random
from dataclasses import replace
from itertools import batched

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vico.data.pack.balance import EQUAL_COST, PackCost, Part, Sharing, assign, share
from tests.unit.conftest import COST


def highest(costs: list[float], assignment: tuple[tuple[int, ...], ...]) -> float:
    return max(sum(costs[pack] for pack in packs) for packs in assignment)


def dealt(num_packs: int, num_ranks: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(range(rank, num_packs, num_ranks)) for rank in range(num_ranks))


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[float], int]:
    num_ranks, per_rank = draw(st.integers(1, 6)), draw(st.integers(0, 6))
    cost = st.one_of(st.integers(0, 4).map(float), st.floats(0, 1e16))
    num_packs = num_ranks * per_rank
    return draw(st.lists(cost, min_size=num_packs, max_size=num_packs)), num_ranks


@settings(max_examples=300, deadline=None)
@given(batches())
def test_every_pack_once_equal_counts_and_never_worse_than_dealing(
    batch: tuple[list[float], int],
) -> None:
    costs, num_ranks = batch
    assignment = assign(costs, num_ranks=num_ranks)
    assert [len(packs) for packs in assignment] == [len(costs) // num_ranks] * num_ranks
    assert sorted(pack for packs in assignment for pack in packs) == list(range(len(costs)))
    assert all(list(packs) == sorted(packs) for packs in assignment)
    assert highest(costs, assignment) <= highest(costs, dealt(len(costs), num_ranks))
    assert assign(tuple(costs), num_ranks=num_ranks) == assignment


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ([1.0] * 6, ((0, 3), (1, 4), (2, 5))),  # equal costs are dealt
        ([0.0] * 4, ((0, 1, 2, 3),)),
        ([9.0, 1.0, 8.0, 2.0], ((0, 1), (2, 3))),  # expensive packs are kept apart
        ([1.0, 1.0, 5.0, 5.0], ((0, 2), (1, 3))),
        # Swapped: greedy alone gives {3, 2, 2} and {3, 2, 0}.
        ([3.0, 3.0, 2.0, 2.0, 2.0, 0.0], ((2, 3, 4), (0, 1, 5))),
    ],
)
def test_assignments_by_hand(costs: list[float], expected: tuple[tuple[int, ...], ...]) -> None:
    assert assign(costs, num_ranks=len(expected)) == expected


def test_swapping_ends_where_sums_are_rounded() -> None:
    """Without a margin for rounding it goes on for ever here."""
    costs = [1.3, 1.3, 1.1, 0.7, 1.1, 1.1, 1.3, 0.3]
    assert highest(costs, assign(costs, num_ranks=4)) == pytest.approx(2.4)


def test_dealing_is_kept_where_greedy_and_swaps_lose() -> None:
    costs = [3.0, 0.0, 2.0, 3.0, 5.0, 2.0, 0.0, 0.0, 2.0]
    assert assign(costs, num_ranks=3) == dealt(9, 3)
    shuffled = sorted(costs)
    assert highest(shuffled, assign(shuffled, num_ranks=3)) == 7.0  # 6 is possible


def test_skewed_costs_are_balanced() -> None:
    """256 packs on 8 and on 32 ranks, samples of 1K to 32K. Measured: 1.0001 and 1.0009; dealt,
    1.10 and 1.17."""
    rng = random.Random(0)
    cost = PackCost(
        per_token=4e10,
        per_token_squared=1.5e6,
        per_tile=1e13,
        full_passes=1,
        compressed_passes=3,
        saved_per_tile=96,
    )
    costs = []
    for _ in range(256):
        parts = rng.choice([1, 2, 4, 8, 32])
        tiles = [rng.randint(0, 96 // parts)] * parts
        costs.append(sum(cost.flops(32768 // parts, tiles=count) for count in tiles))
    mean = sum(costs) / len(costs)
    for num_ranks, bound, unbalanced in ((8, 1.001, 1.05), (32, 1.005, 1.1)):
        per_rank = mean * len(costs) / num_ranks
        assert highest(costs, assign(costs, num_ranks=num_ranks)) / per_rank < bound
        assert highest(costs, dealt(len(costs), num_ranks)) / per_rank > unbalanced


def waits(
    costs: list[list[float]], parts: tuple[tuple[Part, ...], ...], sharing: Sharing
) -> list[float]:
    """What each group works, which is as many microbatches on each of its ranks."""
    return [
        sum(
            max(sum(costs[part.pack][part.first : part.stop]) for part in row)
            for row in zip(*group, strict=True)
        )
        for group in batched(parts, sharing.in_step)
    ]


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[list[float]], int, Sharing]:
    size, groups, per_rank = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 4)),
    )
    num_packs = size * groups * per_rank
    cost = st.one_of(st.integers(0, 4).map(float), st.floats(0, 1e16))
    packs = st.lists(cost, min_size=1, max_size=6)
    counts = draw(st.sampled_from(["equal", "any"]))
    costs = draw(st.lists(packs, min_size=num_packs, max_size=num_packs))
    return costs, size * groups, Sharing(in_step=size, counts=counts)


@settings(max_examples=100, deadline=None)
@given(steps())
def test_every_sample_is_in_one_part_and_ranks_that_wait_have_as_many(
    step: tuple[list[list[float]], int, Sharing],
) -> None:
    costs, num_ranks, sharing = step
    parts = share(costs, num_ranks=num_ranks, sharing=sharing)
    samples = sorted(
        (part.pack, place)
        for of_rank in parts
        for part in of_rank
        for place in range(part.first, part.stop)
    )
    assert samples == [(i, place) for i, pack in enumerate(costs) for place in range(len(pack))]
    assert all(part.first < part.stop for of_rank in parts for part in of_rank)
    if sharing.counts == "equal":
        assert [len(of_rank) for of_rank in parts] == [len(costs) // num_ranks] * num_ranks
    whole = share(costs, num_ranks=num_ranks, sharing=replace(sharing, counts="equal"))
    assert max(waits(costs, parts, sharing)) <= max(waits(costs, whole, sharing)) * (1 + 1e-9)
    assert all(of_rank for of_rank in parts)


@pytest.mark.parametrize("in_step", [1, 4])
def test_packs_of_long_texts_are_balanced_by_cutting(in_step: int) -> None:
    """64 ranks of 4 packs, one in eight of one long sample that costs twice as much; each alone, or
    in groups of 4 that wait for each other and cut at the same time. Measured: 1.125 and 1.111 with
    whole packs, which cannot be better; 1.020 with 270 parts, 1.000 with 288."""
    costs = [[2.0] if i % 8 == 0 else [0.125] * 8 for i in range(256)]
    mean, sharing = sum(map(sum, costs)) / 64, Sharing(in_step=in_step)
    whole = share(costs, num_ranks=64, sharing=replace(sharing, counts="equal"))
    assert max(waits(costs, whole, sharing)) / mean > 1.1
    parts = share(costs, num_ranks=64, sharing=sharing)
    assert max(waits(costs, parts, sharing)) / mean <= 1.03
    assert 256 < sum(map(len, parts)) < 256 * 1.2
    assert {len(of_rank) for of_rank in parts} > {4}


def test_ranks_that_share_experts_work_on_packs_of_like_cost() -> None:
    """Two groups of two: each microbatch costs as much as its most expensive pack."""
    costs = [[cost] for cost in (1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0)]
    parts = share(costs, num_ranks=4, sharing=Sharing(in_step=2))
    packs = [[part.pack for part in of_rank] for of_rank in parts]
    rows = [
        sorted(costs[i][0] for i in row)
        for row in (*zip(*packs[:2], strict=True), *zip(*packs[2:], strict=True))
    ]
    assert sorted(rows) == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]
    with pytest.raises(ValueError, match="4 ranks are no whole number of groups of 3"):
        share(costs, num_ranks=4, sharing=Sharing(in_step=3))


def test_the_cost_of_a_pack() -> None:
    """By hand: 10 and 6 tokens, 2 tiles in the first, whose compressed stream is expected to have 7
    tokens."""
    full, compressed = 20 * 16 + 0.5 * (100 + 36), 20 * 13 + 0.5 * (49 + 36)
    assert COST.flops(10, tiles=2) + COST.flops(6, tiles=0) == full + 3 * compressed + 600
    assert EQUAL_COST.flops(10, tiles=2) == 0.0


def test_packs_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="6 packs do not divide over 4 ranks"):
        assign([1.0] * 6, num_ranks=4)
