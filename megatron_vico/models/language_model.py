"""The language model: an mcore GPTModel from visual tokens to hidden states of response rows.

The only file that knows GPTModel, which mcore will replace one day.

Shapes: T packed tokens, V visual tokens, R response rows, B samples, S tokens of a sample, H
channels.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_vico.config.registry import LanguageConfig
from megatron_vico.models.attention_layout import (
    AttentionLayout,
    KVCache,
    Rotary,
    batch_layout,
    packed_layout,
)
from megatron_vico.models.heads.cross_entropy import CrossEntropy
from megatron_vico.models.heads.kl import KLToReference
from megatron_vico.models.heads.vocabulary import (
    RowLoss,
    VocabularyShard,
    head_loss,
    logits_of,
    row_values,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageInputs:
    """One rank's part of a packed stream; made by parallel/streams.py, which knows the layout."""

    token_ids_T: Tensor
    """[T] int64, the tokens of this context-parallel rank; what stands at a visual position does
    not matter."""

    visual_positions_V: Tensor
    """[V] int64, where among the hidden states that this rank holds the visual tokens of its part
    go."""

    visual_shard_V: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """[V] int64, on the CPU, of all visual tokens of the pack: which of the replica's parts of the
    sequence each is in (context ranks, and in each its sequence ranks). Only their exchange reads
    it."""

    cu_seqlens: Tensor
    """[D + 1] int32, where each of the D documents of the whole pack begins, and the end."""

    document_lens: tuple[int, ...]
    """Tokens of each document, padding included: what `cu_seqlens` says, known without asking the
    device."""

    response_rows_R: Tensor
    """[R] int64, the rows that this rank picks from the hidden states it holds."""

    gathered_rows_R: Tensor | None = None
    """[R'] int64, the rows wanted here among those that all ranks picked; None: a rank picks what
    it wants."""

    shard_len: int
    """Hidden states that this rank holds between layers: T, over the sequence-parallel ranks."""


class TokenPruner(Protocol):
    """Drops tokens between layers; `inference/pruning.py` has those that there are."""

    layers: frozenset[int]

    @property
    def num_tokens_B(self) -> Tensor:
        """[B] int64, on the host, tokens that are left of each sample."""

    def begin(self, hidden: Tensor) -> None:
        """Look at the embeddings."""

    def watch(self, layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        """Look at the attention of one of `layers`."""

    def drop(self, layer: int, hidden: Tensor, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """What goes on behind it."""


class VocabularyHead(ColumnParallelLinear):
    """The output layer, with logits accumulated and kept in float32.

    Losses are taken inside its call, where the hook that gathers parameters for
    `overlap_param_gather` sees the weight used. It does not sum the gradient of its input over
    tensor-parallel ranks: `LanguageModel.forward` does that for its rows.
    """

    def forward(
        self,
        rows: Tensor,
        *,
        loss: RowLoss | None = None,
        row_weight_R: Tensor | None = None,
        observe: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """[..., H] to logits [..., vocabulary of this rank], float32; or their loss, a scalar."""
        if loss is None:
            logits = logits_of(rows.reshape(-1, rows.size(-1)), self.weight)
            return logits.view(*rows.shape[:-1], -1)
        assert row_weight_R is not None
        return head_loss(rows, self.weight, row_weight_R, loss=loss, observe=observe)


class LanguageModel(MegatronModule):
    """One pipeline chunk of Qwen3 or Qwen3-MoE; what DDP wraps and mcore's schedules call."""

    def __init__(
        self, gpt: GPTModel, *, language: LanguageConfig, layout: str, head_chunk_rows: int = 512
    ) -> None:
        """For `build_language_model`, whose arguments these are.

        `layout` is "sdpa" if the layers have this project's attention, "te" if they have
        TransformerEngine's.
        """
        super().__init__(config=gpt.config)
        self.gpt = gpt
        self.language = language
        self.tp_group = gpt.pg_collection.tp
        self.cp_group = gpt.pg_collection.cp
        self.shard = VocabularyShard(
            group=self.tp_group, vocab_size=language.vocab_size, chunk_rows=head_chunk_rows
        )
        self.pre_process: bool = gpt.pre_process
        self.post_process: bool = gpt.post_process
        self.vp_stage: int | None = gpt.vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.rotary = Rotary(language.head_dim, language.rope_theta) if layout == "sdpa" else None

    def set_input_tensor(self, input_tensor: Any) -> None:
        """For mcore's schedules: the hidden states that the previous pipeline stage sent."""
        self.gpt.set_input_tensor(input_tensor)

    def forward(self, inputs: LanguageInputs, visual_tokens_VH: Tensor | None = None) -> Tensor:
        """Run this chunk over a pack, whose visual tokens only the first stage looks at.

        Returns:
            The wanted rows [R, H], after the final norm, on the last stage; elsewhere hidden states
            [s, 1, h]. Under tensor parallelism each rank hands back its own share of the rows'
            gradient: it is summed here.
        """
        embedded = self._embed_pack(inputs, visual_tokens_VH) if self.pre_process else None
        output: Tensor = self.gpt(
            None,
            None,
            None,
            decoder_input=embedded,
            packed_seq_params=self._layout(inputs),
            output_processor=self._rows,
            output_processor_context=inputs,
        )
        return output

    def response_logits(self, rows_RH: Tensor) -> Tensor:
        """[..., H] of `forward` or `forward_batch` to float32 logits over the real vocabulary."""
        logits = self.gpt.output_layer(rows_RH)
        if self.tp_group.size() > 1:
            logits = gather_from_tensor_model_parallel_region(logits, group=self.tp_group)
        real: Tensor = logits[..., : self.language.vocab_size]
        return real

    def consistency_loss(
        self,
        rows_RH: Tensor,
        row_weight_R: Tensor,
        *,
        reference: "LanguageModel",
        reference_rows_RH: Tensor,
        observe: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Eq. 1 over one pack's rows [R, H] from `forward` of both models, weighted and summed.

        `observe` is handed the KL of each row, [R] float32, without a gradient.

        Returns:
            Scalar float32, the same on all tensor-parallel ranks; its gradients as `head_loss`
            says.
        """
        loss = self._kl_to(reference, reference_rows_RH)
        value: Tensor = self.gpt.output_layer(
            rows_RH, loss=loss, row_weight_R=row_weight_R, observe=observe
        )
        return value

    def consistency_rows(
        self, rows_RH: Tensor, *, reference: "LanguageModel", reference_rows_RH: Tensor
    ) -> Tensor:
        """As `consistency_loss`, but the KL of each row, [R] float32, and without a gradient."""
        loss = self._kl_to(reference, reference_rows_RH)
        return row_values(rows_RH, self.head_weight, loss=loss)

    def cross_entropy(self, rows_RH: Tensor, labels_R: Tensor, row_weight_R: Tensor) -> Tensor:
        """As `consistency_loss`, with next-token cross-entropy to `labels_R` [R] int64."""
        loss = CrossEntropy(labels_R=labels_R, shard=self.shard)
        value: Tensor = self.gpt.output_layer(rows_RH, loss=loss, row_weight_R=row_weight_R)
        return value

    @property
    def head_weight(self) -> Tensor:
        """[V / tensor ranks, H], this rank's rows of the vocabulary head, in the last chunk."""
        weight: Tensor = self.gpt.output_layer.weight
        return weight

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        """An empty cache for `forward_batch`, for `batch` samples of at most `max_len` tokens."""
        return KVCache(
            len(self.gpt.decoder.layers),
            batch,
            max_len,
            num_query_groups=self.language.num_query_groups // self.tp_group.size(),
            head_dim=self.language.head_dim,
            dtype=self.config.params_dtype,
            device=self.gpt.embedding.word_embeddings.weight.device,
        )

    def forward_batch(
        self,
        token_ids_BS: Tensor,
        position_ids_BS: Tensor,
        visual_tokens_VH: Tensor | None = None,
        visual_index: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        num_new_B: Tensor | None = None,
        rows_B: Tensor | None = None,
        pruner: TokenPruner | None = None,
    ) -> Tensor:
        """Run the whole model over a batch, for generation: prefill, then decode with S = 1.

        Args:
            token_ids_BS: [B, S] int64, padded at the right where samples differ in length.
            position_ids_BS: [B, S] int64, position of each token in its sample.
            visual_tokens_VH: [V, H], or None where the batch has no new visual tokens.
            visual_index: [V] int64, where each goes in the flattened [B * S].
            cache: what the samples have seen before; the new tokens are added.
            num_new_B: [B] int64 on the host, tokens of each sample that are real; None: all S.
            rows_B: [B] int64 on the host, the samples' rows of the cache; None: the first B.
            pruner: what drops tokens of samples that are new to the cache.

        Returns:
            Hidden states [B, S, H] after the final norm, of tokens that were not dropped;
            meaningless at padding.
        """
        assert self.rotary is not None, "generation needs --attention sdpa"
        assert self.pre_process
        assert self.post_process
        assert not self.config.sequence_parallel
        batch, length = token_ids_BS.shape
        hidden = self.gpt.embedding(token_ids_BS, None)  # [s, b, h]
        if visual_tokens_VH is not None and visual_index is not None:
            rows_V = visual_index % length * batch + visual_index // length
            flat = hidden.flatten(0, 1).index_copy(0, rows_V, visual_tokens_VH.to(hidden.dtype))
            hidden = flat.view(hidden.shape)
        rows_B = torch.arange(batch) if rows_B is None else rows_B
        num_new_B = torch.full((batch,), length) if num_new_B is None else num_new_B
        layout_of = partial(
            batch_layout, cache=cache, rows_B=rows_B, rotary=self.rotary, dtype=hidden.dtype
        )
        if pruner is None:
            layout = layout_of(position_ids_BS, num_new_B=num_new_B)
            output: Tensor = self.gpt.decoder(
                hidden_states=hidden, attention_mask=None, packed_seq_params=layout
            )
        else:
            assert cache is not None
            output, left_LB = self._pruned(hidden, position_ids_BS, pruner, layout_of)
            cache.dropped[:, rows_B] = num_new_B - left_LB
        if cache is not None:
            cache.lengths[rows_B] += num_new_B
        return output.transpose(0, 1)

    def _pruned(
        self,
        hidden: Tensor,
        positions_BS: Tensor,
        pruner: TokenPruner,
        layout_of: Callable[..., AttentionLayout],
    ) -> tuple[Tensor, Tensor]:
        """mcore's loop over the layers; also the tokens that each had, [layers, B]."""
        pruner.begin(hidden)
        left, layout = list[Tensor](), layout_of(positions_BS, num_new_B=pruner.num_tokens_B)
        for number, layer in enumerate(self.gpt.decoder.layers):
            left.append(pruner.num_tokens_B)
            layout.watch = pruner.watch if number in pruner.layers else None
            hidden, _ = layer(hidden_states=hidden, attention_mask=None, packed_seq_params=layout)
            if number in pruner.layers:
                hidden, positions_BS = pruner.drop(number, hidden, positions_BS)
                layout = layout_of(positions_BS, num_new_B=pruner.num_tokens_B)
        return self.gpt.decoder.final_layernorm(hidden), torch.stack(left)

    def _kl_to(self, reference: "LanguageModel", reference_rows_RH: Tensor) -> KLToReference:
        return KLToReference(
            rows_RH=reference_rows_RH, weight_VH=reference.head_weight, shard=self.shard
        )

    def _embed_pack(self, inputs: LanguageInputs, visual_tokens_VH: Tensor | None) -> Tensor:
        # [s, 1, h], this rank's part under sequence parallelism; so are its visual tokens.
        hidden: Tensor = self.gpt.embedding(inputs.token_ids_T[None], None)
        if visual_tokens_VH is not None and len(inputs.visual_positions_V):
            hidden = hidden.index_copy(
                0, inputs.visual_positions_V, visual_tokens_VH.unsqueeze(1).to(hidden.dtype)
            )
        if torch.is_grad_enabled():
            # Under a frozen embedding and without images nothing would want a gradient: mcore's
            # checkpoint would drop those of the layers' weights, and a rank whose part has none
            # would be missing in the backward pass's collectives.
            hidden.requires_grad_()
        return hidden

    def _layout(self, inputs: LanguageInputs) -> PackedSeqParams:
        if self.rotary is not None:
            return packed_layout(
                inputs.cu_seqlens,
                inputs.document_lens,
                rotary=self.rotary,
                dtype=self.config.params_dtype,
                cp_group=self.cp_group,
            )
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=inputs.cu_seqlens,
            cu_seqlens_kv=inputs.cu_seqlens,
            max_seqlen_q=max(inputs.document_lens),
            max_seqlen_kv=max(inputs.document_lens),
        )

    def _rows(self, *, hidden_states: Tensor, context: LanguageInputs, **unused: Any) -> Tensor:
        """Wanted rows, in response order.

        Of the gradient of a row each tensor-parallel rank has the part that belongs to its share of
        the vocabulary; all gathers below sum over ranks in their backward pass.
        """
        rows_RH = hidden_states[:, 0].index_select(0, context.response_rows_R)
        if self.config.sequence_parallel:
            rows_RH = gather_from_sequence_parallel_region(rows_RH, group=self.tp_group)
        elif self.tp_group.size() > 1:
            rows_RH = copy_to_tensor_model_parallel_region(rows_RH, group=self.tp_group)
        if self.cp_group.size() > 1:
            rows_RH = gather_from_sequence_parallel_region(rows_RH, group=self.cp_group)
        if context.gathered_rows_R is not None:
            rows_RH = rows_RH.index_select(0, context.gathered_rows_R)
        return rows_RH if torch.is_grad_enabled() else rows_RH.detach()
