"""The two passes of `vico/consistency.py` over a chunk of logits in torch, block by block.

Shape suffixes: C rows of one chunk, K statistics, V vocabulary entries that this rank holds.
"""

import torch
from torch import Tensor

from megatron_vico.models.heads.vocabulary import row_blocks
from megatron_vico.vico.consistency import (
    NUM_STATISTICS,
    Normaliser,
    block_statistics,
    kl_and_gradient_,
)


def statistics(policy_CV: Tensor, reference_CV: Tensor) -> Tensor:
    """[K, C], see `block_statistics`."""
    found_KC = policy_CV.new_empty(NUM_STATISTICS, len(policy_CV))
    for block in row_blocks(policy_CV):
        found_KC[:, block] = block_statistics(policy_CV[block], reference_CV[block])
    return found_KC


def kl_and_gradient(
    policy_CV: Tensor,
    reference_CV: Tensor,
    normaliser: Normaliser,
    *,
    scale_C: Tensor | None,
    grad_CV: Tensor,
) -> Tensor:
    """[C], this rank's part of the KL; scale (p - q) into `grad_CV`, which may be the logits."""
    values_C = torch.empty_like(normaliser.shift_B)
    for block in row_blocks(policy_CV):
        values_C[block] = kl_and_gradient_(
            policy_CV[block], reference_CV[block], normaliser.rows(block)
        )
        if scale_C is not None:
            torch.mul(policy_CV[block], scale_C[block, None], out=grad_CV[block])
    return values_C
