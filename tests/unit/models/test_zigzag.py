"""The zigzag layout over context-parallel ranks: a fair partition, and TransformerEngine's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_vico.models.zigzag import zigzag_positions

LENS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def naive(document_lens: list[int], cp_size: int, cp_rank: int) -> list[int]:
    """Document by document, chunk by chunk."""
    positions, start = [], 0
    for length in document_lens:
        chunks = torch.arange(start, start + length).chunk(2 * cp_size)
        positions += [*chunks[cp_rank].tolist(), *chunks[2 * cp_size - 1 - cp_rank].tolist()]
        start += length
    return positions


@given(chunk_lens=LENS, cp_size=st.sampled_from([2, 3, 4, 8]))
def test_ranks_partition_the_pack_and_share_the_work(chunk_lens: list[int], cp_size: int) -> None:
    document_lens = [2 * cp_size * length for length in chunk_lens]
    ranks = [
        zigzag_positions(document_lens, cp_size=cp_size, cp_rank=rank) for rank in range(cp_size)
    ]
    for rank, positions in enumerate(ranks):
        assert positions.dtype == torch.int64
        assert positions.tolist() == naive(document_lens, cp_size, rank)
    assert torch.cat(ranks).sort().values.tolist() == list(range(sum(document_lens)))
    assert len({len(positions) for positions in ranks}) == 1
    seen = seen_by_each(document_lens)
    assert len({int(seen[positions].sum()) for positions in ranks}) == 1


def test_consecutive_shares_would_not_share_the_work() -> None:
    first, second = seen_by_each([8, 24]).chunk(2)
    assert int(second.sum()) > 1.5 * int(first.sum())


@given(document_lens=LENS)
def test_one_rank_holds_the_pack_as_it_is(document_lens: list[int]) -> None:
    positions = zigzag_positions(document_lens, cp_size=1, cp_rank=0)
    assert torch.equal(positions, torch.arange(sum(document_lens)))


@pytest.mark.parametrize("cp_size", [2, 4])
def test_the_layout_is_the_one_that_mcore_rotates_by(cp_size: int) -> None:
    """mcore and TransformerEngine agree on the positions that a rank's share of a document has."""
    from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank

    length = 6 * cp_size
    for rank in range(cp_size):
        share = torch.empty(length // cp_size)
        expected = _get_thd_freqs_on_this_cp_rank(rank, cp_size, share, torch.arange(length))
        assert torch.equal(zigzag_positions([length], cp_size=cp_size, cp_rank=rank), expected)


def test_a_document_that_does_not_divide_is_named() -> None:
    message = "document 1 of a pack has 10 tokens, expected a multiple of 4"
    with pytest.raises(ValueError, match=message):
        zigzag_positions([8, 10], cp_size=2, cp_rank=0)


def seen_by_each(document_lens: list[int]) -> Tensor:
    """[T] how many tokens each token of the pack attends to."""
    return torch.cat([torch.arange(1, length + 1) for length in document_lens])
