"""What attention needs to know about a batch: made once a forward pass, for all layers.

An `AttentionLayout` goes to the layers as mcore's packed_seq_params. `packed_layout` makes it for
training, `batch_layout` for generation with a `KVCache`.

Shapes: T packed tokens (of this rank), W packed tokens of all context-parallel ranks, D documents,
B samples, S tokens of a sample, E channels of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_vico.models.to_device import to_device
from megatron_vico.models.zigzag import zigzag_positions


class KVCache:
    """Keys and values of the tokens that samples have seen, for generation; a sample has a row.

    The next token of the sample in row b goes to slot `lengths[b]`; samples may differ in length.
    In the layers in which tokens of it were dropped, it goes as many slots before that.
    It takes memory as they grow longer. megatron-core's contexts do not serve here: the static one
    has one length for its whole batch, so that none can join; the dynamic one needs CUDA.

    Attributes:
        lengths: [B] int64 on the host, tokens of each row; `free` makes it 0.
        dropped: [layers, B] int64 on the host, how many of these a layer does not hold.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        max_len: int,
        *,
        num_query_groups: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, batch, 0, num_query_groups, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        self.dropped = torch.zeros(num_layers, batch, dtype=torch.int64)
        self.max_len = max_len

    def slots(self, rows_B: Tensor, num_new_B: Tensor, num_tokens: int) -> Tensor:
        """The slots [layers, B, S], on the host, that the next `num_tokens` of each row go to.

        Of these the first `num_new_B` are real, the rest padding; one layer where all are equal.
        """
        lengths_B = self.lengths[rows_B]
        needed = int((lengths_B + num_new_B).max())
        assert needed <= self.max_len, f"{needed} tokens in a cache for {self.max_len}"
        dropped_LB = self.dropped[:, rows_B]
        ends_LB = lengths_B - (dropped_LB if dropped_LB.any() else dropped_LB[:1])
        slots_LBS: Tensor = ends_LB[..., None] + torch.arange(num_tokens)
        needed, there = int(slots_LBS.max()) + 1, self.keys.size(2)
        if needed > there:  # at least twice as many, so that copies are few
            grown = max(needed, min(2 * there, self.max_len))
            self.keys, self.values = (
                torch.cat((x, x.new_zeros(*x.shape[:2], grown - there, *x.shape[3:])), dim=2)
                for x in (self.keys, self.values)
            )
        return slots_LBS

    def move(self, source: int, target: int) -> None:
        """Give the sample of row `source` the row `target`; `source` is free then."""
        num_tokens = int(self.lengths[source])
        for each in (self.keys, self.values):
            each[:, target, :num_tokens] = each[:, source, :num_tokens]
        self.lengths[target] = num_tokens
        self.dropped[:, target] = self.dropped[:, source]
        self.free(source)

    def free(self, rows: int | slice) -> None:
        """Forget the samples of some rows."""
        self.lengths[rows] = 0
        self.dropped[:, rows] = 0


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive tokens of one document that a context-parallel rank holds, and what they see."""

    document: int
    num_tokens: int
    num_keys: int
    """Tokens of the document up to the last of the chunk."""

    mask: Tensor | None
    """[num_tokens, num_keys] bool, true where a query sees a key; None if the chunk begins the
    document."""


@dataclass(frozen=True, kw_only=True)
class ContextShare:
    """A context-parallel rank's part of a pack."""

    positions_T: Tensor
    """[T] int64, where in the whole pack each of this rank's tokens is."""

    gathered_rows_W: Tensor
    """[W] int64: for each token of the whole pack, its row in what is gathered from the ranks in
    their order."""

    chunks: tuple[Chunk, ...]
    """In the order in which this rank holds them: two of each document."""


@dataclass(kw_only=True)
class AttentionLayout(PackedSeqParams):
    """mcore's description of a packed batch, with what this project's attention adds to it."""

    cos: Tensor | None = None
    """[T, 1, E/2] (packed) or [S, B, 1, E/2]: rotary position embedding, in the computing dtype."""

    sin: Tensor | None = None

    document_lens: tuple[int, ...] = ()
    """Tokens of each packed document, on all context-parallel ranks together."""

    context: ContextShare | None = None
    """This rank's part of the pack; None where it holds all of it."""

    cache: KVCache | None = None
    rows: slice | Tensor = slice(None)
    """Rows of the cache that the samples have: a slice where they are the first ones, in order, for
    then attention reads the cache where it is."""

    rows_B1: Tensor | None = None
    slots_LBS: Tensor | None = None
    num_slots: tuple[int, ...] = ()
    """Slots of the cache in use after this call, by layer."""

    watch: Callable[[int, Tensor, Tensor, float], None] | None = None
    """Is shown a layer's number, queries, keys and scale, before it attends."""


class Rotary:
    """cos and sin of the rotary position embedding, at given positions."""

    def __init__(self, head_dim: int, theta: float) -> None:
        self.head_dim, self.theta = head_dim, theta

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [..., 1, E/2] at `positions` [...] int64, worked out in float32."""
        channels = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32)
        angles = positions.float().unsqueeze(-1) / self.theta ** (channels / self.head_dim)
        return angles.cos().to(dtype).unsqueeze(-2), angles.sin().to(dtype).unsqueeze(-2)


def packed_layout(
    cu_seqlens: Tensor,
    document_lens: tuple[int, ...],
    *,
    rotary: Rotary,
    dtype: torch.dtype,
    cp_group: torch.distributed.ProcessGroup | None = None,
) -> AttentionLayout:
    """The layout of packed documents; positions begin at 0 in each.

    Args:
        cu_seqlens: [D + 1] int32, where each document of the whole pack begins, and the end.
        document_lens: the same as lengths, on the host: nothing is read back from the device.
        cp_group: the ranks that share the pack, as `zigzag_positions` says; None or one rank, it is
            not shared.
    """
    starts, lens = cu_seqlens[:-1].long(), (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    device, num_tokens, longest = starts.device, sum(document_lens), max(document_lens)
    # `output_size` keeps repeat_interleave from waiting for the device.
    begins_T = starts.repeat_interleave(lens, output_size=num_tokens)
    positions_T = torch.arange(num_tokens, device=device) - begins_T
    layout = AttentionLayout(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        document_lens=document_lens,
    )
    if cp_group is not None and cp_group.size() > 1:
        layout.context = context_share(
            document_lens, cp_size=cp_group.size(), cp_rank=cp_group.rank(), device=device
        )
        positions_T = positions_T.index_select(0, layout.context.positions_T)
    layout.cos, layout.sin = rotary(positions_T, dtype)
    return layout


def context_share(
    document_lens: tuple[int, ...], *, cp_size: int, cp_rank: int, device: torch.device
) -> ContextShare:
    """What `cp_rank` of `cp_size` ranks holds of a pack, and what each part of it sees.

    The masks of a document of n tokens take about n^2 / (2 * cp_size) bytes; documents of equal
    length share theirs.
    """
    ranks = [
        zigzag_positions(document_lens, cp_size=cp_size, cp_rank=rank) for rank in range(cp_size)
    ]
    chunks, masks = [], dict[tuple[int, int], Tensor]()
    for document, length in enumerate(document_lens):
        chunk_len = length // (2 * cp_size)
        for index in (cp_rank, 2 * cp_size - 1 - cp_rank):
            size = (chunk_len, (index + 1) * chunk_len)
            if index and size not in masks:
                everything = torch.ones(size, dtype=torch.bool, device=device)
                masks[size] = everything.tril(index * chunk_len)
            chunks.append(
                Chunk(
                    document=document,
                    num_tokens=chunk_len,
                    num_keys=size[1],
                    mask=masks.get(size),
                )
            )
    return ContextShare(
        positions_T=to_device(ranks[cp_rank], device),
        gathered_rows_W=to_device(torch.cat(ranks).argsort(), device),
        chunks=tuple(chunks),
    )


def batch_layout(
    positions_BS: Tensor,
    *,
    cache: KVCache | None,
    rows_B: Tensor,
    num_new_B: Tensor,
    rotary: Rotary,
    dtype: torch.dtype,
) -> AttentionLayout:
    """The layout of a batch of samples, right-padded or all of one length, for generation.

    `positions_BS` are the tokens' in their samples; they are added to the cache, in `rows_B`.
    """
    cos, sin = rotary(positions_BS.transpose(0, 1), dtype)
    layout = AttentionLayout(qkv_format="sbhd", cos=cos, sin=sin, cache=cache)
    if cache is not None:
        device, num_layers = positions_BS.device, len(cache.keys)
        slots_LBS = cache.slots(rows_B, num_new_B, positions_BS.size(1))
        num_slots = tuple(int(slots_BS.max()) + 1 for slots_BS in slots_LBS)
        layout.num_slots = num_slots * (num_layers // len(num_slots))
        layout.slots_LBS = to_device(slots_LBS, device).expand(num_layers, -1, -1)
        layout.rows_B1 = to_device(rows_B[:, None], device)
        in_order = torch.equal(rows_B, torch.arange(len(rows_B)))
        layout.rows = slice(len(rows_B)) if in_order else layout.rows_B1[:, 0]
    return layout
