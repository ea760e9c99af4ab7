"""Next-token cross-entropy from hidden rows and a vocabulary head, chunked over rows and split over
the vocabulary.

The loss of pretraining, and of the plain fine-tuning step that a consistency step is measured
against.

Shape suffixes: R response rows, C rows of one chunk, B rows of one block, H channels, V vocabulary
entries that this rank holds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vico.models.heads.vocabulary import VocabularyShard, check_head, head_loss, row_blocks


def cross_entropy_loss(
    rows_RH: Tensor,
    *,
    weight_VH: Tensor,
    labels_R: Tensor,
    row_weight_R: Tensor,
    shard: VocabularyShard,
) -> Tensor:
    """Sum over rows of weight * -log p(label).

    Gradients as `fused_head.head_loss` says: that of the rows is this rank's share, to be summed
    over the group; the weight's goes into `main_grad` where there is one, for an incoming gradient
    of 1.

    Args:
        rows_RH: [R, H], after the final norm; the same on all ranks of the group.
        weight_VH: [V, H], this rank's rows of the head.
        labels_R: [R] int64, the entry of the whole vocabulary that each row should predict.
        row_weight_R: [R] float32.
        shard: how the head is split.

    Returns:
        Scalar float32, nats, equal on all ranks of the group; not a view.

    Raises:
        ValueError: if shapes or dtypes do not fit one another.
        RuntimeError: if a label lies outside the vocabulary; on a GPU when the device is next
            waited for.
    """
    check_head(rows_RH, weight_VH, shard, name="cross-entropy")
    if labels_R.shape != rows_RH.shape[:1] or row_weight_R.shape != rows_RH.shape[:1]:
        raise ValueError(
            f"{len(rows_RH)} rows but labels of shape {tuple(labels_R.shape)} and row weights of"
            f" shape {tuple(row_weight_R.shape)}"
        )
    inside = ((labels_R >= 0) & (labels_R < shard.vocab_size)).all()
    torch._assert_async(
        inside, f"a label lies outside the vocabulary of {shard.vocab_size} entries"
    )
    loss = _CrossEntropy(labels_R=labels_R - shard.first(weight_VH), shard=shard)
    return head_loss(rows_RH, weight_VH, row_weight_R, loss=loss, shard=shard)


@dataclass(frozen=True, kw_only=True)
class _CrossEntropy:
    """-log p(label) of each row; a `RowLoss`."""

    labels_R: Tensor
    """[R] int64, counted from this rank's first entry; negative or too large where another rank
    holds the label."""

    shard: VocabularyShard

    def chunk(self, logits_CV: Tensor, rows: slice, *, scale_C: Tensor | None) -> Tensor:
        """See `RowLoss`; needs one collective."""
        top_C, log_sum_C = self._normaliser(logits_CV)
        values_C = torch.zeros_like(top_C)
        width = logits_CV.shape[1]
        if width == 0:  # a rank that holds nothing but padding
            return values_C
        held_C = (self.labels_R[rows] >= 0) & (self.labels_R[rows] < width)
        at_C1 = self.labels_R[rows].clamp(0, width - 1).unsqueeze(-1)
        logits_CV.sub_(top_C.unsqueeze(-1)).sub_(log_sum_C.unsqueeze(-1))  # log p
        values_C -= torch.where(held_C, logits_CV.gather(1, at_C1).squeeze(-1), 0)
        if scale_C is not None:
            logits_CV.exp_().scatter_add_(1, at_C1, -held_C.to(logits_CV.dtype).unsqueeze(-1))
            logits_CV.mul_(scale_C.unsqueeze(-1))
        return values_C

    def _normaliser(self, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
        """The largest logit, [C], and the logarithm of sum e^(logit - largest), [C], over the whole
        vocabulary."""
        statistics_KC = logits_CV.new_zeros(2, len(logits_CV))
        if logits_CV.shape[1] == 0:
            statistics_KC[0] = -torch.inf
        else:
            torch.amax(logits_CV, dim=-1, out=statistics_KC[0])
            for block in row_blocks(logits_CV):
                shifted_BV = logits_CV[block] - statistics_KC[0, block, None]
                statistics_KC[1, block] = shifted_BV.exp_().sum(dim=-1)
        top, total = self.shard.gather(statistics_KC).unbind(dim=1)
        top_C = top.amax(dim=0)
        return top_C, (total * (top - top_C).exp()).sum(dim=0).log()
