"""core_attention modules for megatron-core on torch's scaled_dot_product_attention; they need no
TransformerEngine.

`TileAttention` serves the vision tower, `SDPACoreAttention` the language model. What the language
model's layers need to know about a batch travels in an `AttentionLayout`, made once a forward pass
and handed through mcore as its packed_seq_params.

Under context parallelism (`models/zigzag.py` has the layout) keys and values of the whole pack
are gathered in every layer: simple, and equal to one rank. TransformerEngine, on a GPU, sends them
round a ring instead.

Shapes: T packed tokens (of this rank), B samples, S tokens of a sample, A heads of queries, G heads
of keys, E channels of a head, W packed tokens of all context-parallel ranks.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vico.models.zigzag import zigzag_positions

_MOST_PADDING = 2.0
"""Documents are padded to the longest of a pack, and attended in one call, up to this many times
the real tokens."""

_MOST_WASTED_PAIRS = 2048
"""And on a CPU only while that adds no more pairs of tokens a document, in the mean. One core takes
about 0.06 ms for a call of its own, forward and backward, and as long for 2,000 pairs under 4
heads: 32 documents of 30 to 46 tokens take 5.8 ms padded and 6.8 apart, 4 of 272 to 576 tokens 65
padded and 31 apart."""


class KVCache:
    """Keys and values of the tokens that a batch of samples has seen, for generation.

    Sample b's next token goes to slot `lengths[b]`; samples may differ in length.

    Attributes:
        lengths: [B] int64, tokens of each sample that are in the cache. The engine may overwrite
            it.
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
        shape = (num_layers, batch, max_len, num_query_groups, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.max_len = max_len

    def slots(self, num_tokens: int) -> Tensor:
        """The slots [B, S] that the next `num_tokens` tokens of each sample go to."""
        slots_BS: Tensor = self.lengths[:, None] + torch.arange(
            num_tokens, device=self.lengths.device
        )
        assert int(slots_BS.max()) < self.max_len, (
            f"{int(slots_BS.max()) + 1} tokens in a cache for {self.max_len}"
        )
        return slots_BS

    def select(self, samples: Tensor) -> "KVCache":
        """A cache of some of the samples, to drop those that have ended; `samples` is [B']
        int64."""
        part = object.__new__(KVCache)
        part.keys, part.values = (
            self.keys.index_select(1, samples),
            self.values.index_select(1, samples),
        )
        part.lengths, part.max_len = self.lengths.index_select(0, samples), self.max_len
        return part


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive tokens of one document that a context-parallel rank holds, and what they see."""

    document: int
    num_keys: int
    """Tokens of the document up to the last of the chunk."""

    mask: Tensor | None
    """[tokens of the chunk, num_keys] bool, true where a query sees a key; None if the chunk begins
    the document."""


@dataclass(frozen=True, kw_only=True)
class ContextShare:
    """A context-parallel rank's part of a pack."""

    positions_T: Tensor
    """[T] int64, where in the whole pack each of this rank's tokens is."""

    gathered_rows_W: Tensor
    """[W] int64: for each token of the whole pack, its row in what is gathered from the ranks in
    their order."""

    pack_rows_W: Tensor
    """[W] int64, the inverse: for each gathered row, its place in the whole pack."""

    chunks: tuple[Chunk, ...]
    """In the order in which this rank holds them: two of each document."""

    chunk_lens: tuple[int, ...]


@dataclass(kw_only=True)
class AttentionLayout(PackedSeqParams):
    """mcore's description of a packed batch, with what this project's attention works out once for
    all layers."""

    cos: Tensor | None = None
    """[T, 1, E/2] (packed) or [S, B, 1, E/2]: rotary position embedding, in the computing dtype."""

    sin: Tensor | None = None

    document_lens: tuple[int, ...] = ()
    """Tokens of each packed document, on all context-parallel ranks together."""

    context: ContextShare | None = None
    """This rank's part of the pack; None where it holds all of it."""

    gather_rows: Tensor | None = None
    """[D * longest] int64: the packed row at each place of the padded batch (any row where it is
    padding)."""

    padded_rows: Tensor | None = None
    """[T] int64: the place in the padded batch of each packed row."""

    cache: KVCache | None = None
    slots_BS: Tensor | None = None
    num_slots: int = 0
    """Slots of the cache in use after this call."""


class Rotary:
    """cos and sin of the rotary position embedding, at given positions."""

    def __init__(self, head_dim: int, theta: float) -> None:
        self.head_dim, self.theta = head_dim, theta

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [..., 1, E/2] at `positions` [...] int64, worked out in float32."""
        exponents = (
            torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32)
            / self.head_dim
        )
        angles = positions.float().unsqueeze(-1) / self.theta**exponents
        return angles.cos().to(dtype).unsqueeze(-2), angles.sin().to(dtype).unsqueeze(-2)


def packed_layout(
    cu_seqlens: Tensor,
    document_lens: tuple[int, ...],
    *,
    rotary: Rotary,
    dtype: torch.dtype,
    cp_group: torch.distributed.ProcessGroup | None = None,
) -> AttentionLayout:
    """The layout of packed documents, for all layers of one forward pass.

    Args:
        cu_seqlens: [D + 1] int32, where each document of the whole pack begins, and the end.
        document_lens: the same as lengths, on the host: nothing is read back from the device.
        rotary: the model's position embedding.
        dtype: computing dtype.
        cp_group: the ranks that share the pack, as `zigzag_positions` says; None or one rank, it is
            not shared.

    Returns:
        A layout whose positions begin at 0 in each document.

    Raises:
        ValueError: if the pack is shared and a document is not a multiple of 2 * ranks long.
    """
    starts, lens = cu_seqlens[:-1].long(), (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    num_tokens, max_seqlen = sum(document_lens), max(document_lens)
    begins_T = starts.repeat_interleave(lens, output_size=num_tokens)
    positions_T = torch.arange(num_tokens, device=starts.device) - begins_T
    context = None
    if cp_group is not None and cp_group.size() > 1:
        context = context_share(
            document_lens, cp_size=cp_group.size(), cp_rank=cp_group.rank(), device=starts.device
        )
        positions_T = positions_T.index_select(0, context.positions_T)
    cos, sin = rotary(positions_T, dtype)
    layout = AttentionLayout(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        cos=cos,
        sin=sin,
        document_lens=document_lens,
        context=context,
    )
    if context is not None:
        return layout
    num_documents = len(document_lens)
    if _padding_pays(document_lens, max_seqlen, device=starts.device):
        places = starts[:, None] + torch.arange(max_seqlen, device=starts.device)
        layout.gather_rows = places.clamp_(max=num_tokens - 1).flatten()
        documents_T = torch.arange(num_documents, device=starts.device).repeat_interleave(
            lens, output_size=num_tokens
        )
        layout.padded_rows = documents_T * max_seqlen + positions_T
    return layout


def _padding_pays(document_lens: tuple[int, ...], max_seqlen: int, *, device: torch.device) -> bool:
    """Whether documents of unequal lengths are attended faster in one padded call than each in its
    own."""
    num_tokens, padded = sum(document_lens), len(document_lens) * max_seqlen
    if not num_tokens < padded <= _MOST_PADDING * num_tokens:
        return False
    wasted_pairs = padded * max_seqlen - sum(length**2 for length in document_lens)
    return device.type != "cpu" or wasted_pairs <= _MOST_WASTED_PAIRS * len(document_lens)


def context_share(
    document_lens: tuple[int, ...], *, cp_size: int, cp_rank: int, device: torch.device
) -> ContextShare:
    """What `cp_rank` of `cp_size` ranks holds of a pack of documents, and what each part of it
    sees.

    Lengths are in tokens. The masks of a document of n tokens take about n^2 / (2 * cp_size) bytes;
    documents of equal length share theirs.
    """
    ranks = [
        zigzag_positions(document_lens, cp_size=cp_size, cp_rank=rank) for rank in range(cp_size)
    ]
    pack_rows_W = torch.cat(ranks)
    chunks, chunk_lens, masks = [], [], dict[tuple[int, int], Tensor]()
    for document, length in enumerate(document_lens):
        chunk_len = length // (2 * cp_size)
        for place in (cp_rank, 2 * cp_size - 1 - cp_rank):
            size = (chunk_len, (place + 1) * chunk_len)
            if place and size not in masks:
                masks[size] = torch.ones(size, dtype=torch.bool, device=device).tril(
                    place * chunk_len
                )
            chunks.append(Chunk(document=document, num_keys=size[1], mask=masks.get(size)))
            chunk_lens.append(chunk_len)
    return ContextShare(
        positions_T=ranks[cp_rank].to(device, non_blocking=True),
        gathered_rows_W=pack_rows_W.argsort().to(device, non_blocking=True),
        pack_rows_W=pack_rows_W.to(device, non_blocking=True),
        chunks=tuple(chunks),
        chunk_lens=tuple(chunk_lens),
    )


def batch_layout(
    positions_BS: Tensor, *, cache: KVCache | None, rotary: Rotary, dtype: torch.dtype
) -> AttentionLayout:
    """The layout of a batch of samples, right-padded or all of one length, for generation.

    Args:
        positions_BS: [B, S] int64, position of each token in its sample.
        cache: what the samples have seen before; the new tokens are added to it. None, nothing.
        rotary: the model's position embedding.
        dtype: computing dtype.

    Returns:
        A layout for one forward pass.
    """
    cos, sin = rotary(positions_BS.transpose(0, 1), dtype)
    layout = AttentionLayout(qkv_format="sbhd", cos=cos, sin=sin, cache=cache)
    if cache is not None:
        layout.slots_BS = cache.slots(positions_BS.size(1))
        layout.num_slots = int(layout.slots_BS.max()) + 1
    return layout


class SDPACoreAttention(MegatronModule):
    """Causal attention of the language model, within the documents of a pack or over a cache; does
    the rotation too.

    Positions are rotated here and not by mcore, whose unfused rotation loops over documents, in
    every layer, and takes as long as the rest of a small layer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal
        assert attention_type == "self"
        self.cp_group = pg_collection.cp if pg_collection is not None else None
        cp_size = 1 if self.cp_group is None else self.cp_group.size()
        assert cp_size == config.context_parallel_size, (
            f"a context-parallel group of {cp_size} ranks, and a configuration for"
            f" {config.context_parallel_size}"
        )
        self.cp_size = cp_size
        self.layer = layer_number - 1
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [T, A, E] of packed documents, or [S, B, A, E] of a batch, not yet rotated. Under
                context parallelism this rank's tokens only.
            key: [T, G, E] or [S, B, G, E].
            value: as `key`.
            attention_mask: must be None; the layout says it all.
            attn_mask_type: unused, always causal.
            attention_bias: must be None.
            packed_seq_params: an AttentionLayout.

        Returns:
            [T, A * E] or [S, B, A * E].
        """
        assert attention_mask is None
        assert attention_bias is None
        layout = packed_seq_params
        assert isinstance(layout, AttentionLayout)
        assert layout.cos is not None
        assert layout.sin is not None
        assert (self.cp_size > 1) == (layout.context is not None), (
            "packed_layout needs the model's context-parallel group; generation works without"
            " context parallelism only"
        )
        query, key = (
            _Rotate.apply(query, layout.cos, layout.sin),
            _Rotate.apply(key, layout.cos, layout.sin),
        )
        if layout.qkv_format == "sbhd":
            return self._batch(query, key, value, layout)
        if layout.context is not None:
            return self._shared(query, key, value, layout.document_lens, context=layout.context)
        if layout.gather_rows is not None:
            return self._padded(query, key, value, layout)
        if len(set(layout.document_lens)) == 1:
            shape = (len(layout.document_lens), layout.document_lens[0], -1, query.size(-1))
            return (
                self._attend(query.view(shape), key.view(shape), value.reshape(shape))
                .flatten(0, 1)
                .flatten(1)
            )
        lens = list(layout.document_lens)
        documents = zip(query.split(lens), key.split(lens), value.split(lens), strict=True)
        return torch.cat(
            [self._attend(q[None], k[None], v[None])[0] for q, k, v in documents]
        ).flatten(1)

    def _padded(self, query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout) -> Tensor:
        """All documents in one call, each padded at its end, where causality keeps the padding out
        of sight."""
        shape = (len(layout.document_lens), layout.max_seqlen_q, -1, query.size(-1))
        q, k, v = (
            _TakeRows.apply(x, layout.gather_rows, layout.padded_rows).view(shape)
            for x in (query, key, value)
        )
        padded = self._attend(q, k, v).flatten(0, 1).flatten(1)
        unpadded: Tensor = _Unpad.apply(padded, layout.padded_rows)
        return unpadded

    def _shared(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        document_lens: tuple[int, ...],
        *,
        context: ContextShare,
    ) -> Tensor:
        """This rank's queries against the keys and values of all context-parallel ranks, chunk by
        chunk.

        Memory and time are quadratic in the longest document, and each layer keeps the keys and
        values of the whole pack for the backward pass. Ran on CPUs only.
        """
        # Backward, each rank gets back the sum over ranks of its own tokens' gradients.
        gathered = gather_from_sequence_parallel_region(
            torch.cat((key, value), dim=1), group=self.cp_group
        )
        pack = _TakeRows.apply(gathered, context.gathered_rows_W, context.pack_rows_W)
        documents = pack.split(list(document_lens))
        outputs = []
        for chunk, q in zip(context.chunks, query.split(list(context.chunk_lens)), strict=True):
            k, v = documents[chunk.document][: chunk.num_keys].chunk(2, dim=1)
            outputs.append(self._attend(q[None], k[None], v[None], mask=chunk.mask)[0])
        return torch.cat(outputs).flatten(1)

    def _batch(self, query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        cache, slots_BS = layout.cache, layout.slots_BS
        if cache is None or slots_BS is None:
            return self._attend(q, k, v).transpose(0, 1).flatten(2)
        keys, values = cache.keys[self.layer], cache.values[self.layer]
        samples_B1 = torch.arange(slots_BS.size(0), device=slots_BS.device)[:, None]
        keys[samples_B1, slots_BS], values[samples_B1, slots_BS] = (
            k.to(keys.dtype),
            v.to(values.dtype),
        )
        if layout.num_slots == slots_BS.size(1):  # the first tokens of every sample
            return self._attend(q, k, v).transpose(0, 1).flatten(2)
        # Slots beyond a sample's own length hold padding or nothing; no query looks that far.
        seen_BSK = torch.arange(layout.num_slots, device=slots_BS.device) <= slots_BS[:, :, None]
        keys, values = keys[:, : layout.num_slots], values[:, : layout.num_slots]
        return self._attend(q, keys, values, mask=seen_BSK[:, None]).transpose(0, 1).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """[B, S, A, E] from [B, S, A, E] and [B, K, G, E], causal where there is no mask."""
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=q.size(2) != k.size(2),
        )
        return out.transpose(1, 2)


class TileAttention(MegatronModule):
    """Attention between all patches of a tile, for a vision tower that keeps tiles first: [N, S, A,
    E]."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.no_mask
        assert attention_type == "self"
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **unused: Any,
    ) -> Tensor:
        """Attend; all of [N, S, A, E], the result [N, S, A * E]."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)


class _Rotate(torch.autograd.Function):
    """Rotary position embedding on halves; the backward pass is the rotation by the opposite
    angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, sign=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, sign=-1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, *, sign: int) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (x1, x2), (out1, out2) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(x1, cos, out=out1).addcmul_(x2, sin, value=-sign)
    torch.mul(x2, cos, out=out2).addcmul_(x1, sin, value=sign)
    return out


class _TakeRows(torch.autograd.Function):
    """Rows in another order, or padded; autograd would add up their gradients row by row, which is
    many times slower.

    Padding repeats real rows, and yet the backward pass only picks the real places: no gradient
    reaches padding, because no query looks at it and `_Unpad` drops its own output.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, inverse_rows: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_rows)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse_rows,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse_rows), None, None


class _Unpad(torch.autograd.Function):
    """Padded rows back to packed rows; like `_TakeRows`, but the padding is left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, padded_rows: Tensor) -> Tensor:
        ctx.save_for_backward(padded_rows)
        ctx.num_rows = x.size(0)
        return x.index_select(0, padded_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (padded_rows,) = ctx.saved_tensors
        grad = grads[0]
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, padded_rows, grad), None
