"""This rank's part of a packed stream: padded for the layout, cut over context and sequence ranks.

Everything here is integer arithmetic on the CPU, done once a pack. The ranks of a replica hold the
same pack, so each also knows what the others hold: no length and no row has to be asked for.

Shapes: T tokens of a pack, D documents (samples) of it, V visual tokens, R response rows.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_vico.data.samples import PackedStream
from megatron_vico.models.language_model import LanguageInputs
from megatron_vico.models.to_device import to_device
from megatron_vico.models.zigzag import zigzag_positions
from megatron_vico.parallel.groups import Groups

FP8_ALIGNMENT = {"tensorwise": 16, "blockwise": 128}
"""Tokens of a rank's shard must be a multiple of this under FP8: a weight's gradient is a product
over tokens, and TransformerEngine quantises them in such blocks."""

_PAD_ID = 0


@dataclass(frozen=True, kw_only=True)
class StreamCut:
    """How streams are padded and cut over a replica's ranks, and which part is this rank's."""

    context_size: int = 1
    """Ranks that share each document: rank r of n takes chunks r and 2n - 1 - r of the document's
    2n."""

    context_rank: int = 0

    sequence_size: int = 1
    """Tensor-parallel ranks that share the hidden states of a context rank; 1 without sequence
    parallelism."""

    sequence_rank: int = 0

    alignment: int = 1
    """What the tokens of one rank's shard must be a multiple of; see `FP8_ALIGNMENT`."""

    @classmethod
    def of(cls, groups: Groups, *, sequence_parallel: bool, alignment: int = 1) -> "StreamCut":
        """This rank's cut in a layout."""
        language = groups.language
        return cls(
            context_size=language.cp.size(),
            context_rank=language.cp.rank(),
            sequence_size=language.tp.size() if sequence_parallel else 1,
            sequence_rank=language.tp.rank() if sequence_parallel else 0,
            alignment=alignment,
        )

    @property
    def document_multiple(self) -> int:
        """What a document's length must be a multiple of: two chunks a context rank."""
        return 2 * self.context_size if self.context_size > 1 else 1

    @property
    def pack_multiple(self) -> int:
        """What a pack's length must be a multiple of."""
        return self.document_multiple * self.sequence_size * self.alignment


def pad_stream(stream: PackedStream, cut: StreamCut) -> PackedStream:
    """Pad a stream to the multiples that a layout needs; `stream` itself if it has them already.

    Padding is no response and gets no visual token, so it has no loss.
    """
    lens_D = stream.cu_seqlens.diff().long()
    each = cut.document_multiple
    # Each document at its own end, where causality keeps padding out of its tokens' sight; then the
    # pack by one document more, of padding only.
    padded_D = (lens_D + each - 1) // each * each
    num_tokens = int(padded_D.sum())
    tail = -num_tokens % cut.pack_multiple
    if tail == 0 and num_tokens == len(stream.token_ids):
        return stream
    starts_D = padded_D.cumsum(0) - padded_D
    shift_D = starts_D - stream.cu_seqlens[:-1].long()
    shift_T = shift_D.repeat_interleave(lens_D)
    ids = torch.full((num_tokens + tail,), _PAD_ID, dtype=stream.token_ids.dtype)
    ids[torch.arange(len(stream.token_ids)) + shift_T] = stream.token_ids
    ends = [*(starts_D + padded_D).tolist(), *([num_tokens + tail] if tail else [])]
    return replace(
        stream,
        token_ids=ids,
        cu_seqlens=torch.tensor([0, *ends], dtype=torch.int32),
        visual_positions=stream.visual_positions + shift_T[stream.visual_positions],
        response_rows=stream.response_rows + shift_T[stream.response_rows],
    )


def language_inputs(stream: PackedStream, cut: StreamCut, device: torch.device) -> LanguageInputs:
    """This rank's part of a packed stream (not padded yet, on the CPU), on its device."""
    padded = pad_stream(stream, cut)
    local_T, where_T = _places(padded, cut)
    local_len = len(local_T)
    shard_len = local_len // cut.sequence_size
    places_V = where_T[padded.visual_positions]
    shard_V = places_V // shard_len
    own_V = shard_V == cut.context_rank * cut.sequence_size + cut.sequence_rank
    rows, gathered = _response_rows(where_T[padded.response_rows], local_len, cut)

    def sent(tensor: Tensor) -> Tensor:
        return to_device(tensor, device)

    return LanguageInputs(
        token_ids_T=sent(padded.token_ids[local_T]),
        visual_positions_V=sent(places_V[own_V] % shard_len),
        visual_shard_V=shard_V,
        cu_seqlens=sent(padded.cu_seqlens),
        document_lens=tuple(padded.cu_seqlens.diff().tolist()),
        response_rows_R=sent(rows),
        gathered_rows_R=None if gathered is None else sent(gathered),
        shard_len=shard_len,
    )


def row_slice(num_rows: int, *, size: int, rank: int) -> slice:
    """A context rank's response rows of a pack: an equal run of both streams, in response order."""
    return slice(num_rows * rank // size, num_rows * (rank + 1) // size)


def _places(padded: PackedStream, cut: StreamCut) -> tuple[Tensor, Tensor]:
    """This context rank's positions, in its order; for each, rank * local length + place."""
    if cut.context_size == 1:
        every_T = torch.arange(len(padded.token_ids))
        return every_T, every_T
    lens = padded.cu_seqlens.diff().tolist()
    held = [
        zigzag_positions(lens, cp_size=cut.context_size, cp_rank=rank)
        for rank in range(cut.context_size)
    ]
    # The inverse of the order in which the ranks, one after the other, hold the pack.
    where_T = torch.empty(len(padded.token_ids), dtype=torch.int64)
    where_T[torch.cat(held)] = torch.arange(len(padded.token_ids))
    return held[cut.context_rank], where_T


def _response_rows(
    places_R: Tensor, local_len: int, cut: StreamCut
) -> tuple[Tensor, Tensor | None]:
    """Rows this rank picks from its shard, and where those it needs lie once all are gathered.

    Only picked rows travel, padded to the largest number that one rank has; gathered over sequence
    ranks first, then over context ranks.
    """
    num_shards = cut.context_size * cut.sequence_size
    if num_shards == 1:
        return places_R, None
    shard_len = local_len // cut.sequence_size
    shard_R, offset_R = places_R // shard_len, places_R % shard_len
    counts = torch.bincount(shard_R, minlength=num_shards)
    # One row at least, so that every rank takes part in the gather's backward.
    longest = max(int(counts.max()), 1)
    order_R = shard_R.argsort(stable=True)
    # Which of its shard's rows each row is: its rank among all rows in shard order, less the first.
    firsts = counts.cumsum(0) - counts
    within_R = torch.empty_like(order_R)
    within_R[order_R] = torch.arange(len(order_R)) - firsts.repeat_interleave(counts)
    picked = torch.zeros(longest, dtype=torch.int64)  # the rest picks row 0, which nobody reads
    own_R = shard_R == cut.context_rank * cut.sequence_size + cut.sequence_rank
    picked[within_R[own_R]] = offset_R[own_R]
    rows = row_slice(len(places_R), size=cut.context_size, rank=cut.context_rank)
    return picked, (shard_R * longest + within_R)[rows]
