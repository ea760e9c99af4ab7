"""Tiles over ranks: equal runs in order, whole images where they are asked for."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vico.parallel.tile_parallel import TileSplit, TokenExchange, split_tiles


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


def test_a_turn_sends_a_chunk_to_the_ranks_that_embed_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without sequence parallelism each tensor-parallel rank gets every token: of all of a rank's
    tiles at once that would be as many copies of them."""
    tokens_per_tile, tiles = 4, 8
    sizes: list[int] = []
    monkeypatch.setattr(
        TokenExchange, "_all_to_all", lambda self, sent, *_: sizes.append(len(sent)) or sent[:0]
    )
    tensor, context = (SimpleNamespace(size=lambda size=size: size) for size in (4, 1))
    language = SimpleNamespace(tp=tensor, cp=context)
    groups = SimpleNamespace(replica=None, language=language, device=torch.device("cpu"))
    num_tokens = tiles * tokens_per_tile
    inputs = SimpleNamespace(
        visual_shard_V=torch.zeros(num_tokens, dtype=torch.int64),
        document_lens=(num_tokens,),
        shard_len=num_tokens,
    )
    split = split_tiles([1] * tiles, num_ranks=4, rank=0)
    counts = [torch.full((tiles,), tokens_per_tile)]
    exchange = TokenExchange(counts, [inputs], split, groups, chunk_tiles=1)
    for turn in range(split.num_turns(1)):
        exchange.deliver(turn, torch.zeros(tokens_per_tile, 3), None)
    assert sizes == [4 * tokens_per_tile] * 2
