"""Next-token cross-entropy from hidden rows and a vocabulary head, over chunks and ranks.

The loss of pretraining, and of the plain fine-tuning step that a consistency step is measured
against.

Shape suffixes: R response rows, C rows of one chunk, B rows of one block, H channels, V vocabulary
entries that this rank holds, K = 2 statistics.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vico.models.heads.vocabulary import VocabularyShard, row_blocks


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """-log p(label) of each row, in nats; a `RowLoss`."""

    labels_R: Tensor
    """[R] int64, the entry of the whole vocabulary that each row should predict."""

    shard: VocabularyShard

    def check(self, rows_RH: Tensor, weight_VH: Tensor) -> None:
        """See `RowLoss`; a label outside the vocabulary is a RuntimeError, on a GPU a late one."""
        if self.labels_R.shape != rows_RH.shape[:1]:
            raise ValueError(
                f"{len(rows_RH)} rows but labels of shape {tuple(self.labels_R.shape)}"
            )
        inside = ((self.labels_R >= 0) & (self.labels_R < self.shard.vocab_size)).all()
        # Raised when the device is next waited for: a check on the host would wait here.
        torch._assert_async(
            inside, f"a label lies outside the vocabulary of {self.shard.vocab_size} entries"
        )

    def chunk(
        self,
        logits_CV: Tensor,
        rows: slice,
        *,
        first: int,
        scale_C: Tensor | None,
        grad_CV: Tensor,
    ) -> Tensor:
        """See `RowLoss`; one collective."""
        top_C, log_sum_C = self._normaliser(logits_CV)
        values_C = torch.zeros_like(top_C)
        width = logits_CV.shape[1]
        if width == 0:  # a rank that holds nothing but padding
            return values_C
        labels_C = self.labels_R[rows] - first
        held_C = (labels_C >= 0) & (labels_C < width)  # else another rank holds the label
        at_C1 = labels_C.clamp(0, width - 1).unsqueeze(-1)
        logits_CV.sub_(top_C.unsqueeze(-1)).sub_(log_sum_C.unsqueeze(-1))  # log p
        values_C -= torch.where(held_C, logits_CV.gather(1, at_C1).squeeze(-1), 0)
        if scale_C is not None:
            logits_CV.exp_().scatter_add_(1, at_C1, -held_C.to(logits_CV.dtype).unsqueeze(-1))
            torch.mul(logits_CV, scale_C.unsqueeze(-1), out=grad_CV)
        return values_C

    def _normaliser(self, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
        """[C] the largest logit, and [C] log sum e^(logit - largest), over the whole vocabulary."""
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
