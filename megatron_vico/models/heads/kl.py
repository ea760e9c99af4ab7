"""Eq. 1 of the ViCO paper from hidden rows and both vocabulary heads, over chunks and ranks.

The maths is in `vico/consistency.py`; here are the reference's logits, made beside the policy's and
gone with the chunk, and the collective between the two passes over both.

Shape suffixes: R response rows, C rows of one chunk, H channels, V vocabulary entries that this
rank holds.
"""

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from megatron_vico.models.heads.vocabulary import VocabularyShard, check_head, logits_of
from megatron_vico.vico.consistency import normaliser


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
        self,
        logits_CV: Tensor,
        rows: slice,
        *,
        first: int,
        scale_C: Tensor | None,
        grad_CV: Tensor,
    ) -> Tensor:
        """See `RowLoss`; one collective."""
        reference_CV = logits_of(self.rows_RH[rows], self.shard.real(self.weight_VH))
        passes = passes_for(logits_CV)
        # Ranks that hold nothing but padding come here too: the others wait for them.
        statistics = self.shard.gather(passes.statistics(logits_CV, reference_CV))
        values_C: Tensor = passes.kl_and_gradient(
            logits_CV, reference_CV, normaliser(statistics), scale_C=scale_C, grad_CV=grad_CV
        )
        return values_C


def passes_for(logits_CV: Tensor) -> ModuleType:
    """Who makes the two passes: Triton's kernels on CUDA, where it is there, else torch."""
    kernels = (
        logits_CV.is_cuda
        and logits_CV.dtype == torch.float32
        and importlib.util.find_spec("triton") is not None
    )
    name = "kl_kernels" if kernels else "kl_blocks"
    return importlib.import_module(f"megatron_vico.models.heads.{name}")
