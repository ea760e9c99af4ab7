"""Eq. 1 of the ViCO paper from hidden rows and both vocabulary heads, over chunks and ranks.

The maths of a block is in `vico/consistency.py`; here are the reference's logits, made beside the
policy's and gone with the chunk, and the collective between two steps of it.

Shape suffixes: R response rows, C rows of one chunk, H channels, V vocabulary entries that this
rank holds, K statistics.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vico.models.heads.vocabulary import (
    VocabularyShard,
    check_head,
    logits_of,
    row_blocks,
)
from megatron_vico.vico.consistency import (
    NUM_STATISTICS,
    block_statistics,
    kl_and_gradient_,
    normaliser,
)


@dataclass(frozen=True, kw_only=True)
class KLToReference:
    """KL(reference || policy) of each row, in nats; a `RowLoss` on the policy's rows and head.

    Exactly 0, with exactly zero gradients, where rows and heads of the two models are bitwise
    equal.
    """

    rows_RH: Tensor
    """[R, H], the reference's, from the uncompressed image: the policy's tokens in the same order.
    No gradient reaches them or the head."""

    weight_VH: Tensor
    """[V, H], this rank's rows of the reference's head, split as the policy's."""

    shard: VocabularyShard

    def check(self, rows_RH: Tensor, weight_VH: Tensor) -> None:
        """See `RowLoss`."""
        check_head(self.rows_RH, self.weight_VH, self.shard, name="reference")
        if len(rows_RH) != len(self.rows_RH):
            raise ValueError(
                f"{len(self.rows_RH)} reference rows but {len(rows_RH)} policy rows; both streams"
                " must give the same response rows"
            )
        if len(weight_VH) != len(self.weight_VH):
            raise ValueError(
                f"the reference's head has {len(self.weight_VH)} rows on this rank, the policy's"
                f" {len(weight_VH)}; both must be split and padded alike"
            )

    def chunk(
        self, logits_CV: Tensor, rows: slice, *, first: int, scale_C: Tensor | None
    ) -> Tensor:
        """See `RowLoss`; one collective."""
        reference_CV = logits_of(self.rows_RH[rows], self.shard.real(self.weight_VH))
        statistics_KC = logits_CV.new_empty(NUM_STATISTICS, len(logits_CV))
        for block in row_blocks(logits_CV):
            statistics_KC[:, block] = block_statistics(logits_CV[block], reference_CV[block])
        # Ranks that hold nothing but padding come here too: the others wait for them.
        over_all = normaliser(self.shard.gather(statistics_KC))
        values_C = torch.empty_like(over_all.shift_B)
        for block in row_blocks(logits_CV):
            values_C[block] = kl_and_gradient_(
                logits_CV[block], reference_CV[block], over_all.rows(block)
            )
            if scale_C is not None:
                logits_CV[block] *= scale_C[block, None]
        return values_C
