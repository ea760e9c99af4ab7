"""Eq. 1 of the ViCO paper from hidden rows and both vocabulary heads, chunked over rows and split
over the vocabulary.

Equals `vico/consistency.py`'s `forward_kl` on whole logits, and is right to the last digits for the
same reasons.

Shape suffixes: R response rows, C rows of one chunk, B rows of one block, H channels, V vocabulary
entries that this rank holds.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_vico.models.heads.vocabulary import (
    VocabularyShard,
    check_head,
    head_loss,
    logits_of,
    row_blocks,
    row_values,
)


def kl_loss(
    policy_rows_RH: Tensor,
    *,
    policy_weight_VH: Tensor,
    reference_rows_RH: Tensor,
    reference_weight_VH: Tensor,
    row_weight_R: Tensor,
    shard: VocabularyShard,
) -> Tensor:
    """Sum over response rows of weight * KL(reference || policy); Eq. 1 of the ViCO paper.

    Gradients as `fused_head.head_loss` says: that of the rows is this rank's share, to be summed
    over the group; the weight's goes into `main_grad` where there is one, for an incoming gradient
    of 1.

    Args:
        policy_rows_RH: [R, H], after the final norm, from the compressed image; the same on all
            ranks of the group.
        policy_weight_VH: [V, H], this rank's rows of the policy's head.
        reference_rows_RH: [R, H], the same tokens in the same order, from the uncompressed image;
            gets no gradient.
        reference_weight_VH: [V, H], this rank's rows of the reference's head, split as the
            policy's; no gradient.
        row_weight_R: [R] float32, 1 / (response tokens of the row's sample * samples in the global
            batch).
        shard: how both heads are split.

    Returns:
        Scalar float32, nats, equal on all ranks of the group; exactly 0, with exactly zero
        gradients, where rows and heads of the two models are bitwise equal. Not a view, as
        Megatron's pipeline schedules want it.

    Raises:
        ValueError: if shapes or dtypes do not fit one another.
    """
    loss = _to_reference(
        policy_rows_RH, policy_weight_VH, reference_rows_RH, reference_weight_VH, shard
    )
    if row_weight_R.shape != policy_rows_RH.shape[:1]:
        raise ValueError(
            f"{len(policy_rows_RH)} policy rows but row weights of shape"
            f" {tuple(row_weight_R.shape)}"
        )
    return head_loss(policy_rows_RH, policy_weight_VH, row_weight_R, loss=loss, shard=shard)


def kl_rows(
    policy_rows_RH: Tensor,
    *,
    policy_weight_VH: Tensor,
    reference_rows_RH: Tensor,
    reference_weight_VH: Tensor,
    shard: VocabularyShard,
) -> Tensor:
    """KL(reference || policy) of each row, [R] float32 nats, without gradient: what the ratio of
    Eq. 2 is made of.

    Arguments, equality on all ranks and errors as in `kl_loss`.
    """
    loss = _to_reference(
        policy_rows_RH, policy_weight_VH, reference_rows_RH, reference_weight_VH, shard
    )
    return row_values(policy_rows_RH, policy_weight_VH, loss=loss, shard=shard)


def _to_reference(
    policy_rows_RH: Tensor,
    policy_weight_VH: Tensor,
    reference_rows_RH: Tensor,
    reference_weight_VH: Tensor,
    shard: VocabularyShard,
) -> "_KLToReference":
    check_head(policy_rows_RH, policy_weight_VH, shard, name="policy")
    check_head(reference_rows_RH, reference_weight_VH, shard, name="reference")
    if len(policy_rows_RH) != len(reference_rows_RH):
        raise ValueError(
            f"{len(reference_rows_RH)} reference rows but {len(policy_rows_RH)} policy rows; both"
            " streams must give the same response rows"
        )
    if len(policy_weight_VH) != len(reference_weight_VH):
        raise ValueError(
            f"the reference's head has {len(reference_weight_VH)} rows on this rank, the policy's "
            f"{len(policy_weight_VH)}; both must be split and padded alike"
        )
    return _KLToReference(
        rows_RH=reference_rows_RH.detach(),
        weight_VH=shard.real(reference_weight_VH.detach()),
        shard=shard,
    )


class _Normaliser(NamedTuple):
    """What turns logits into log-probabilities, over the whole vocabulary."""

    reference_C: Tensor
    """[C], log-sum-exp of the reference."""

    shift_C: Tensor
    """[C], log-sum-exp of the policy minus that of the reference, exact where both are near."""


@dataclass(frozen=True, kw_only=True)
class _KLToReference:
    """KL(q || p) of each row, q the reference's distribution and p the policy's; a `RowLoss`."""

    rows_RH: Tensor
    weight_VH: Tensor
    shard: VocabularyShard

    def chunk(self, logits_CV: Tensor, rows: slice, *, scale_C: Tensor | None) -> Tensor:
        """See `RowLoss`; needs one collective."""
        reference_CV = logits_of(self.rows_RH[rows], self.weight_VH)
        statistics_KC = logits_CV.new_zeros(6, len(logits_CV))
        for block in row_blocks(logits_CV):
            _statistics(logits_CV[block], reference_CV[block], out_KB=statistics_KC[:, block])
        normaliser = _normaliser(self.shard.gather(statistics_KC))
        values_C = torch.empty_like(normaliser.shift_C)
        for block in row_blocks(logits_CV):
            part = _Normaliser(normaliser.reference_C[block, None], normaliser.shift_C[block, None])
            values_C[block] = _to_difference(logits_CV[block], reference_CV[block], part)
            if scale_C is not None:
                logits_CV[block] *= scale_C[block, None]
        return values_C


def _statistics(policy_BV: Tensor, reference_BV: Tensor, *, out_KB: Tensor) -> None:
    """Over this rank's entries: of q the largest logit, the sum of e^(logit - largest) and the near
    sum; of p the first two; the largest difference of logits."""
    if policy_BV.shape[1] == 0:  # a rank that holds nothing but padding
        out_KB[0], out_KB[3] = -torch.inf, -torch.inf
        return
    delta_BV = policy_BV - reference_BV
    out_KB[5] = torch.maximum(delta_BV.amax(dim=-1), -delta_BV.amin(dim=-1))
    out_KB[0] = reference_BV.amax(dim=-1)
    weight_BV = (reference_BV - out_KB[0].unsqueeze(-1)).exp_()
    out_KB[1] = weight_BV.sum(dim=-1)
    out_KB[2] = weight_BV.mul_(delta_BV.expm1_()).sum(dim=-1)
    out_KB[3] = policy_BV.amax(dim=-1)
    out_KB[4] = torch.sub(policy_BV, out_KB[3].unsqueeze(-1), out=weight_BV).exp_().sum(dim=-1)


def _normaliser(statistics: Tensor) -> _Normaliser:
    """From every rank's statistics, [ranks, 6, C]."""
    q_max, q_sum, near, p_max, p_sum, delta = statistics.unbind(dim=1)
    q_top_C, p_top_C = q_max.amax(dim=0), p_max.amax(dim=0)
    q_share = (q_max - q_top_C).exp()
    q_total_C = (q_sum * q_share).sum(dim=0)
    p_total_C = (p_sum * (p_max - p_top_C).exp()).sum(dim=0)
    # The sum of q (p' / q - 1), p' the policy before it is normalised: keeps its digits where both
    # are near, and is of no use (perhaps infinite) where they are far.
    near_C = ((near * q_share).sum(dim=0) / q_total_C).log1p()
    far_C = (p_top_C - q_top_C) + (p_total_C / q_total_C).log()
    return _Normaliser(q_top_C + q_total_C.log(), torch.where(delta.amax(dim=0) < 1, near_C, far_C))


def _to_difference(policy_BV: Tensor, reference_BV: Tensor, normaliser: _Normaliser) -> Tensor:
    """Turn the policy's logits into p - q in place; returns this rank's part of the KL, [B]. The
    reference's are spent.

    With x = log q - log p from the difference of the logits, p - q is q (e^-x - 1) and the KL the
    sum of q (e^-x - 1 + x), whose terms are all >= 0: see `vico/consistency.py`. Where p is the
    larger, p (1 - e^x) is the same and cannot overflow. Written for the larger of both, it needs no
    choice between two forms, which on a CPU costs more than an exponential.
    """
    x_BV = (reference_BV - policy_BV).add_(normaliser.shift_C)
    log_larger_BV = reference_BV.sub_(normaliser.reference_C).sub_(x_BV.clamp_max(0))
    larger_BV = log_larger_BV.exp_()
    difference_BV = torch.abs(x_BV, out=policy_BV).neg_().expm1_().mul_(larger_BV).mul_(x_BV.sign())
    q_BV = larger_BV.sub_(difference_BV.clamp_min(0))
    return q_BV.mul_(x_BV).add_(difference_BV).sum(dim=-1)
