"""Tiles over ranks: equal runs in order, whole images where they are asked for."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_vico.parallel.tile_parallel import TileSplit, split_tiles


def shares(units: list[int], num_ranks: int) -> list[TileSplit]:
    return [split_tiles(units, num_ranks=num_ranks, rank=rank) for rank in range(num_ranks)]


@given(st.integers(0, 300), st.integers(1, 40))
def test_no_two_ranks_differ_by_more_than_one_tile(num_tiles: int, num_ranks: int) -> None:
    counts = [share.own.stop - share.own.start for share in shares([1] * num_tiles, num_ranks)]
    assert sum(counts) == num_tiles
    assert max(counts) - min(counts) <= 1


@given(st.lists(st.integers(1, 13), max_size=40), st.integers(1, 20))
def test_whole_images_stay_on_one_rank(images: list[int], num_ranks: int) -> None:
    ends = {0}
    for count in images:
        ends.add(max(ends) + count)
    starts = shares(images, num_ranks)[0].starts
    assert starts[0] == 0
    assert starts[-1] == sum(images)
    assert list(starts) == sorted(starts)
    assert set(starts) <= ends
    # A boundary is at most half an image away from where it would be best.
    for rank, start in enumerate(starts):
        assert abs(start - sum(images) * rank / num_ranks) <= max(images, default=0) / 2


@given(st.lists(st.integers(1, 13), max_size=40), st.integers(1, 20))
def test_all_ranks_agree(images: list[int], num_ranks: int) -> None:
    assert len({share.starts for share in shares(images, num_ranks)}) == 1


@given(st.lists(st.integers(1, 13), max_size=40), st.integers(1, 20), st.integers(1, 16))
def test_turns_take_each_tile_of_a_rank_once(
    images: list[int], num_ranks: int, chunk_tiles: int
) -> None:
    for share in shares(images, num_ranks):
        turns = range(share.num_turns(chunk_tiles))
        for rank in range(num_ranks):
            runs = [share.turn(rank, turn, chunk_tiles) for turn in turns]
            taken = [tile for run in runs for tile in range(run.start, run.stop)]
            own = share.of(rank)
            assert taken == list(range(own.start, own.stop))
            assert max(run.stop - run.start for run in runs) <= chunk_tiles
