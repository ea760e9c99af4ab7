"""core_attention modules for megatron-core on torch's scaled_dot_product_attention.

`TileAttention` serves the vision tower, `SDPACoreAttention` the language model where there is no
TransformerEngine.

Shapes: N tiles, S patches of a tile; T packed tokens (of this rank), B samples, S tokens of a
sample, A heads of queries, G heads of keys, E channels of a head.
"""

import math
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

from megatron_vico.models.attention_layout import AttentionLayout, ContextShare


class TileAttention(MegatronModule):
    """Attention between all patches of a tile, for a vision tower that keeps tiles first."""

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
        """[N, S, A * E] from three times [N, S, A, E]."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)


class SDPACoreAttention(MegatronModule):
    """Causal attention within the documents of a pack, or over a cache; does the rotation too.

    mcore's unfused rotation loops over documents, in every layer, and takes as long as the rest of
    a small layer. Under context parallelism (`models/zigzag.py` has the layout) keys and values of
    the whole pack are gathered in every layer: simple, and equal to one rank. TransformerEngine, on
    a GPU, sends them round a ring instead.
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
        self.cp_size = 1 if self.cp_group is None else self.cp_group.size()
        assert self.cp_size == config.context_parallel_size, (
            f"a context-parallel group of {self.cp_size} ranks, and a configuration for"
            f" {config.context_parallel_size}"
        )
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
        """[T, A * E] from [T, A, E] and twice [T, G, E], not yet rotated; [S, B] for T in a batch.

        packed_seq_params, an AttentionLayout, says who sees whom.
        """
        layout = packed_seq_params
        assert attention_mask is None
        assert attention_bias is None
        assert isinstance(layout, AttentionLayout)
        assert (self.cp_size > 1) == (layout.context is not None), (
            "packed_layout needs the model's context-parallel group; generation works without"
            " context parallelism only"
        )
        assert layout.cos is not None
        assert layout.sin is not None
        query = rotate(query, layout.cos, layout.sin)
        key = rotate(key, layout.cos, layout.sin)
        if layout.qkv_format == "sbhd":
            return self._batch(query, key, value, layout)
        if layout.context is not None:
            return self._shared(query, key, value, layout.document_lens, context=layout.context)
        lens = list(layout.document_lens)
        documents = zip(query.split(lens), key.split(lens), value.split(lens), strict=True)
        attended = [self._attend(q[None], k[None], v[None])[0] for q, k, v in documents]
        return torch.cat(attended).flatten(1)

    def _shared(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        document_lens: tuple[int, ...],
        *,
        context: ContextShare,
    ) -> Tensor:
        """This rank's queries against the keys and values of all ranks, chunk by chunk.

        Memory and time are quadratic in the longest document, and each layer keeps the keys and
        values of the whole pack for the backward pass. Ran on CPUs only.
        """
        # Backward, each rank gets back the sum over ranks of its own tokens' gradients.
        gathered = gather_from_sequence_parallel_region(
            torch.cat((key, value), dim=1), group=self.cp_group
        )
        pack = gathered.index_select(0, context.gathered_rows_W)
        documents = pack.split(list(document_lens))
        queries = query.split([chunk.num_tokens for chunk in context.chunks])
        outputs = []
        for chunk, q in zip(context.chunks, queries, strict=True):
            k, v = documents[chunk.document][: chunk.num_keys].chunk(2, dim=1)
            outputs.append(self._attend(q[None], k[None], v[None], mask=chunk.mask)[0])
        return torch.cat(outputs).flatten(1)

    def _batch(self, query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        if layout.watch is not None:
            layout.watch(self.layer, q, k, self.scale)
        cache, rows = layout.cache, layout.rows
        if cache is None or layout.slots_LBS is None:
            return self._attend(q, k, v).transpose(0, 1).flatten(2)
        slots_BS, num_slots = layout.slots_LBS[self.layer], layout.num_slots[self.layer]
        keys, values = cache.keys[self.layer], cache.values[self.layer]
        keys[layout.rows_B1, slots_BS] = k.to(keys.dtype)
        values[layout.rows_B1, slots_BS] = v.to(values.dtype)
        if num_slots == slots_BS.size(1):  # the first tokens of every sample
            return self._attend(q, k, v).transpose(0, 1).flatten(2)
        # Slots beyond a sample's own length hold padding or nothing; no query looks that far.
        seen_BSK = torch.arange(num_slots, device=slots_BS.device) <= slots_BS[:, :, None]
        keys, values = keys[rows, :num_slots], values[rows, :num_slots]
        return self._attend_masked(q, keys, values, seen_BSK).transpose(0, 1).flatten(2)

    def _attend_masked(self, q: Tensor, k: Tensor, v: Tensor, seen_BSK: Tensor) -> Tensor:
        """[B, S, A, E] as `_attend`; heads that share a key are more queries of one head.

        torch's kernels that take a mask know no groups of heads, and without it would fall back to
        the one that keeps all scores.
        """
        batch, num_queries, heads, channels = q.shape
        groups, share = k.size(2), heads // k.size(2)
        q = q.view(batch, num_queries, groups, share, channels)
        mask = seen_BSK[:, None].expand(-1, share, -1, -1).flatten(1, 2)
        out = self._attend(
            q.permute(0, 3, 1, 2, 4).flatten(1, 2), k, v, mask=mask[:, None]
        )  # [B, share * S, G, E]
        out = out.view(batch, share, num_queries, groups, channels)
        return out.permute(0, 2, 3, 1, 4).reshape(batch, num_queries, heads, channels)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """[B, S, A, E] from [B, S, A, E] and [B, K, G, E], causal where there is no mask."""
        share = q.size(2) // k.size(2)
        if share > 1 and _no_fused_kernel_has_groups(q, mask):
            k, v = (each.repeat_interleave(share, dim=2) for each in (k, v))
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


def _no_fused_kernel_has_groups(q: Tensor, mask: Tensor | None) -> bool:
    """Of CUDA's those of 16 bits without a mask have; torch would keep all scores instead."""
    return q.is_cuda and (mask is not None or q.dtype == torch.float32)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding on halves."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
