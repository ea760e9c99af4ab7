"""No sample lost, split or repeated, within the limits."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vico.data.pack.packing import LARGE, MAX_CARRIES, PackLimits, iter_packs
from megatron_vico.errors import SampleError

LIMITS = PackLimits(capacity=100, max_tiles=12, max_samples=7)
SIZES = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 12)), max_size=120)


def pack_sizes(sizes, *, limits=LIMITS, window=16):
    lengths, tiles = ([size[column] for size in sizes] for column in (0, 1))
    return list(iter_packs(lengths, tiles=tiles, limits=limits, window=window))


@settings(max_examples=200, deadline=None)
@given(SIZES, st.sampled_from([1, 5, 16, 1000]))
def test_every_sample_is_in_exactly_one_pack_within_the_limits(sizes, window):
    packs = pack_sizes(sizes, window=window)
    assert sorted(i for members in packs for i in members) == list(range(len(sizes)))
    for members in packs:
        assert sum(sizes[i][0] for i in members) <= LIMITS.capacity
        assert sum(sizes[i][1] for i in members) <= LIMITS.max_tiles
        assert 1 <= len(members) <= LIMITS.max_samples
    assert packs == pack_sizes(sizes, window=window)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([60, 99]), st.just(1)), max_size=60), st.integers(1, 5))
def test_no_sample_waits_longer_than_its_carries(sizes, window):
    """Two samples of 60 never fit together: without a limit they would be carried to the end of the
    epoch."""
    newest = 0
    for members in pack_sizes(sizes, window=window):
        newest = max(newest, max(members) // window)
        assert newest - min(members) // window <= MAX_CARRIES


def fewest(sizes, limits):
    """By trying every way: each set of samples is one pack, or one pack and the fewest for the
    rest."""
    sets = range(1 << len(sizes))
    members = [[sizes[i] for i in range(len(sizes)) if chosen >> i & 1] for chosen in sets]
    fits = [
        sum(tokens for tokens, _ in each) <= limits.capacity
        and sum(tiles for _, tiles in each) <= limits.max_tiles
        and len(each) <= (limits.max_samples or len(each))
        for each in members
    ]
    best = [0] * len(members)
    for chosen in sets[1:]:
        part, counts = chosen, []
        while part:
            if fits[part]:
                counts.append(1 + best[chosen ^ part])
            part = (part - 1) & chosen
        best[chosen] = min(counts)
    return best[-1]


FEW_SIZES = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 6)), min_size=1, max_size=7)


@settings(max_examples=150, deadline=None)
@given(FEW_SIZES)
def test_packs_of_one_window_against_all_possible_ones(sizes):
    """The bounds of `_best_fit`; with so few samples, 11/9 of the fewest + 1."""
    for limits, bound in (
        (PackLimits(capacity=20, max_tiles=1000), lambda best: 11 / 9 * best + 1),
        (PackLimits(capacity=20, max_tiles=6), lambda best: 3 * best),
        (PackLimits(capacity=20, max_tiles=6, max_samples=3), lambda best: 4 * best),
    ):
        best = fewest(sizes, limits)
        assert best <= len(pack_sizes(sizes, limits=limits, window=100)) <= bound(best)


def test_packs_of_one_window_are_mostly_the_fewest():
    rng = random.Random(0)
    limits, ours, best = PackLimits(capacity=20, max_tiles=6), 0, 0
    for _ in range(200):
        sizes = [(rng.randint(1, 20), rng.randint(0, 6)) for _ in range(7)]
        ours += len(pack_sizes(sizes, limits=limits, window=100))
        best += fewest(sizes, limits)
    assert best <= ours < 1.03 * best  # measured 1.016


def test_small_samples_stay_in_the_global_order():
    """Else packs of a toy task, where all samples are small, would be sorted by length and so by
    content."""
    lengths = [10 + i % 2 for i in range(64)]
    assert max(lengths) < 8 * 100 * LARGE
    limits = PackLimits(capacity=1000, max_tiles=100, max_samples=8)
    packs = pack_sizes([(length, 1) for length in lengths], limits=limits, window=32)
    assert packs == [tuple(range(start, start + 8)) for start in range(0, 64, 8)]


@pytest.mark.parametrize("too_large", [(101, 1), (1, 13)])
def test_a_sample_larger_than_a_pack_is_refused(too_large):
    message = r"sample 1 of the stream: .* but a pack holds 100 tokens and 12 tiles"
    with pytest.raises(SampleError, match=message):
        pack_sizes([(5, 1), too_large])
