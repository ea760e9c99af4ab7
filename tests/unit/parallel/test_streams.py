"""Packed streams padded and cut for a layout: nothing is lost, and the ranks' parts make the whole
again."""

import dataclasses

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_vico.data.samples import PackedStream
from megatron_vico.models.language_model import LanguageInputs
from megatron_vico.parallel.streams import StreamCut, language_inputs, pad_stream, row_slice

CPU = torch.device("cpu")


@st.composite
def streams(draw: st.DrawFn) -> PackedStream:
    """Documents of any lengths, with visual tokens and response rows anywhere."""
    lens = draw(st.lists(st.integers(1, 40), min_size=1, max_size=6))
    num_tokens = sum(lens)
    chosen = draw(
        st.lists(
            st.sampled_from(["text", "visual", "response"]),
            min_size=num_tokens,
            max_size=num_tokens,
        )
    )
    places = {
        kind: torch.tensor([i for i, each in enumerate(chosen) if each == kind]).long()
        for kind in set(chosen)
    }
    return PackedStream(
        compressed=torch.zeros(0, dtype=torch.bool),
        token_ids=torch.arange(1, num_tokens + 1),
        cu_seqlens=torch.tensor([0, *lens]).cumsum(0).int(),
        visual_positions=places.get("visual", torch.zeros(0, dtype=torch.int64)),
        response_rows=places.get("response", torch.zeros(0, dtype=torch.int64)),
    )


cuts = st.builds(
    StreamCut,
    context_size=st.sampled_from([1, 2, 4]),
    sequence_size=st.sampled_from([1, 2, 3, 4]),
    alignment=st.sampled_from([1, 16, 128]),
)


def everyone(cut: StreamCut) -> list[StreamCut]:
    """The cuts of all ranks, sequence ranks next to one another."""
    return [
        dataclasses.replace(cut, context_rank=context, sequence_rank=sequence)
        for context in range(cut.context_size)
        for sequence in range(cut.sequence_size)
    ]


@given(streams(), cuts)
def test_padding_meets_every_need_of_a_layout(stream: PackedStream, cut: StreamCut) -> None:
    padded = pad_stream(stream, cut)
    lens = padded.cu_seqlens.diff().tolist()
    num_tokens = len(padded.token_ids)
    assert int(padded.cu_seqlens[-1]) == num_tokens
    assert all(
        length % (2 * cut.context_size if cut.context_size > 1 else 1) == 0 for length in lens
    )
    shares = cut.context_size * cut.sequence_size
    assert num_tokens % shares == 0
    assert num_tokens // shares % cut.alignment == 0
    # No more than needed: less than a unit a document, and less than one of the pack.
    before = sum(stream.cu_seqlens.diff().tolist())
    assert num_tokens - before < len(lens) * cut.document_multiple + cut.pack_multiple


@given(streams(), cuts)
def test_padding_moves_tokens_and_keeps_them(stream: PackedStream, cut: StreamCut) -> None:
    padded = pad_stream(stream, cut)
    real = padded.token_ids > 0  # padding is 0, the tokens are numbered from 1
    assert torch.equal(padded.token_ids[real], stream.token_ids)
    for name in ("visual_positions", "response_rows"):
        old, new = getattr(stream, name), getattr(padded, name)
        assert torch.equal(padded.token_ids[new], stream.token_ids[old])
    # A token keeps its document and its place in it.
    for start, end, new_start in zip(
        stream.cu_seqlens[:-1].tolist(),
        stream.cu_seqlens[1:].tolist(),
        padded.cu_seqlens.tolist(),
        strict=False,
    ):
        assert torch.equal(
            padded.token_ids[new_start : new_start + end - start], stream.token_ids[start:end]
        )


@given(streams())
def test_one_rank_needs_no_padding(stream: PackedStream) -> None:
    assert pad_stream(stream, StreamCut()) is stream


@given(streams(), cuts)
def test_every_rank_gets_its_share_of_rows_in_response_order(
    stream: PackedStream, cut: StreamCut
) -> None:
    """The exchange by hand: hidden states are token ids, each rank picks, all picks are joined,
    each takes its own."""
    parts = {
        (each.context_rank, each.sequence_rank): language_inputs(stream, each, CPU)
        for each in everyone(cut)
    }
    picked = torch.cat(
        [_shard(part, cut, sequence)[part.response_rows_R] for (_, sequence), part in parts.items()]
    )
    expected = stream.token_ids[stream.response_rows]
    found = []
    for (context, sequence), part in parts.items():
        rows = picked if part.gathered_rows_R is None else picked[part.gathered_rows_R]
        share = row_slice(len(expected), size=cut.context_size, rank=context)
        assert torch.equal(rows, expected[share])
        if sequence == 0:
            found.append(rows)
    assert torch.equal(torch.cat(found), expected)


@given(streams(), cuts)
def test_visual_tokens_go_where_they_belong(stream: PackedStream, cut: StreamCut) -> None:
    seen = []
    expected = stream.token_ids[stream.visual_positions]
    for shard, each in enumerate(everyone(cut)):
        part = language_inputs(stream, each, CPU)
        own = part.visual_shard_V == shard
        held = _shard(part, cut, each.sequence_rank)
        assert torch.equal(held[part.visual_positions_V], expected[own])
        seen.append(own)
    assert torch.equal(torch.stack(seen).sum(0), torch.ones(len(expected), dtype=torch.int64))


@given(streams(), cuts)
def test_ranks_hold_equal_parts_of_the_whole(stream: PackedStream, cut: StreamCut) -> None:
    parts = [language_inputs(stream, each, CPU) for each in everyone(cut)]
    assert len({part.shard_len for part in parts}) == 1
    padded = pad_stream(stream, cut)
    assert parts[0].shard_len * len(parts) == len(padded.token_ids)
    held = torch.cat(
        [parts[context * cut.sequence_size].token_ids_T for context in range(cut.context_size)]
    )
    assert sorted(held.tolist()) == sorted(padded.token_ids.tolist())


def _shard(part: LanguageInputs, cut: StreamCut, sequence: int) -> Tensor:
    """What a sequence-parallel rank holds of a context rank's tokens."""
    return part.token_ids_T.chunk(cut.sequence_size)[sequence]
