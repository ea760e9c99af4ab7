"""Eq. 1 of the ViCO paper: the policy answers from compressed tiles as the reference does from all.

    L_ViCO = E_xi [ 1/N sum_i KL( pi_ref(y_i | y_<i, I) || pi_policy(y_i | y_<i, I_xi) ) ]

Here stands the KL of one response row i and its gradient. The expectation over xi is in
`compression_plan.py`; 1/N and the mean over samples are a weight of each row, made where samples
are packed. With q the reference's distribution and p the policy's,

    KL(q || p) = sum_v q (log q - log p),    dKL / d(policy's logits) = p - q.

Both are differences of large numbers that are nearly equal just where ViCO trains: computed as
written, in float32, a KL of 1.5e-6 nats is off by 8 %, and Eq. 2 divides two such values. With
x = log q - log p, worked out from the difference of the logits,

    p - q = q (e^-x - 1),    KL(q || p) = sum_v q (e^-x - 1 + x),

whose terms are all >= 0: nothing cancels. (The sums are equal since sum_v (p - q) = 0.)

A large vocabulary is split over ranks, and rows are worked on block by block. Hence three steps:

    block_statistics   six numbers a row from a rank's part of the vocabulary
    normaliser         what makes logits log-probabilities, from all ranks' statistics
    kl_and_gradient_   a rank's part of the KL, and p - q in the place of the policy's logits

`models/heads/kl.py` takes them over chunks and ranks; `forward_kl` is one block on one rank.

Shape suffixes: R response rows, B rows of one block, K = 6 statistics, V vocabulary entries that
this rank holds.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NUM_STATISTICS = 6


def block_statistics(policy_BV: Tensor, reference_BV: Tensor) -> Tensor:
    """What `normaliser` has to know of a block, from this rank's part of the vocabulary.

    Args:
        policy_BV: [B, V] float32 logits; V may be 0.
        reference_BV: [B, V] float32 logits.

    Returns:
        [K, B]: of q the largest logit, sum e^(logit - largest) and sum e^(logit - largest)
        (e^delta - 1), with delta = policy's logit - reference's; of p the first two; max |delta|.
    """
    if policy_BV.shape[1] == 0:  # a rank that holds nothing but padding
        nothing = policy_BV.new_tensor([-torch.inf, 0, 0, -torch.inf, 0, 0])
        return nothing[:, None].expand(-1, len(policy_BV))
    delta_BV = policy_BV - reference_BV
    max_delta_B = torch.maximum(delta_BV.amax(dim=-1), -delta_BV.amin(dim=-1))
    q_max_B = reference_BV.amax(dim=-1)
    weight_BV = (reference_BV - q_max_B.unsqueeze(-1)).exp_()
    q_sum_B = weight_BV.sum(dim=-1)
    near_B = weight_BV.mul_(delta_BV.expm1_()).sum(dim=-1)
    p_max_B = policy_BV.amax(dim=-1)
    p_sum_B = torch.sub(policy_BV, p_max_B.unsqueeze(-1), out=weight_BV).exp_().sum(dim=-1)
    return torch.stack([q_max_B, q_sum_B, near_B, p_max_B, p_sum_B, max_delta_B])


class Normaliser(NamedTuple):
    """What turns logits into log-probabilities, over the whole vocabulary."""

    reference_B: Tensor
    """[B], log-sum-exp of the reference's logits."""

    shift_B: Tensor
    """[B], log-sum-exp of the policy's logits minus that of the reference's."""

    def rows(self, block: slice) -> "Normaliser":
        """Of some of the rows."""
        return Normaliser(self.reference_B[block], self.shift_B[block])


def normaliser(statistics: Tensor) -> Normaliser:
    """From the statistics of every rank, [ranks, K, B]; the only place where ranks meet."""
    q_max, q_sum, near, p_max, p_sum, max_delta = statistics.unbind(dim=1)
    q_top_B, p_top_B = q_max.amax(dim=0), p_max.amax(dim=0)
    q_share = (q_max - q_top_B).exp()
    q_total_B = (q_sum * q_share).sum(dim=0)
    p_total_B = (p_sum * (p_max - p_top_B).exp()).sum(dim=0)
    # shift = log sum_v q e^delta = log(1 + sum_v q (e^delta - 1)), which keeps its digits where
    # the two models are near, and overflows where they are far: there, the difference of the two
    # log-sum-exps, both worked out from their own largest logit.
    near_B = ((near * q_share).sum(dim=0) / q_total_B).log1p()
    far_B = (p_top_B - q_top_B) + (p_total_B / q_total_B).log()
    shift_B = torch.where(max_delta.amax(dim=0) < 1, near_B, far_B)
    return Normaliser(q_top_B + q_total_B.log(), shift_B)


def kl_and_gradient_(policy_BV: Tensor, reference_BV: Tensor, normaliser: Normaliser) -> Tensor:
    """KL(q || p) of each row and its gradient, over this rank's part of the vocabulary.

    Args:
        policy_BV: [B, V] float32 logits; overwritten by p - q.
        reference_BV: [B, V] float32 logits; overwritten by nothing of use.
        normaliser: of these rows, over the whole vocabulary.

    Returns:
        [B] float32, nats; the sum over ranks is the KL.
    """
    # Near logits are subtracted without rounding; two log-softmaxes are already rounded.
    x_BV = (reference_BV - policy_BV).add_(normaliser.shift_B.unsqueeze(-1))
    # Where p > q, q (e^-x - 1) may be 0 times infinity; p (1 - e^x) is the same and cannot. Written
    # for the larger of p and q, p - q = sign(x) larger (e^-|x| - 1) needs no choice between two
    # forms, which on a CPU costs more than an exponential.
    log_q_BV = reference_BV.sub_(normaliser.reference_B.unsqueeze(-1))
    larger_BV = log_q_BV.sub_(x_BV.clamp_max(0)).exp_()
    difference_BV = torch.abs(x_BV, out=policy_BV).neg_().expm1_().mul_(larger_BV).mul_(x_BV.sign())
    q_BV = larger_BV.sub_(difference_BV.clamp_min(0))
    return q_BV.mul_(x_BV).add_(difference_BV).sum(dim=-1)


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, reference_RV: Tensor, policy_RV: Tensor
    ) -> Tensor:
        gradient_RV = policy_RV.clone()
        over_all = normaliser(block_statistics(policy_RV, reference_RV).unsqueeze(0))
        kl_R = kl_and_gradient_(gradient_RV, reference_RV.clone(), over_all)
        ctx.save_for_backward(gradient_RV)
        return kl_R

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_R: Tensor) -> tuple[None, Tensor]:
        (gradient_RV,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return None, gradient_RV * grad_R.unsqueeze(-1)


def forward_kl(reference_logits_RV: Tensor, policy_logits_RV: Tensor) -> Tensor:
    """KL(reference || policy) at each response row; the summand of Eq. 1 of the ViCO paper.

    Args:
        reference_logits_RV: [R, V] float32, from the frozen reference on the uncompressed image;
            gets no gradient.
        policy_logits_RV: [R, V] float32, same rows in the same order, from the policy on the
            compressed image.

    Returns:
        [R] float32, nats, >= 0; exactly 0, with an exactly zero gradient, where both rows are
        bitwise equal.

    Raises:
        ValueError: if the two shapes differ, or a dtype is coarser than float32 (bf16 logits put an
            error of 20-144 % on the gradient at the KL values ViCO trains at).
    """
    if reference_logits_RV.shape != policy_logits_RV.shape:
        raise ValueError(
            f"reference logits {tuple(reference_logits_RV.shape)} and policy logits"
            f" {tuple(policy_logits_RV.shape)} differ in shape; both streams must give the same"
            " response rows"
        )
    for name, logits in (("reference", reference_logits_RV), ("policy", policy_logits_RV)):
        if logits.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} logits are {logits.dtype}, expected float32: take the head's product in"
                " fp32"
            )
    kl_R: Tensor = _ForwardKL.apply(reference_logits_RV.detach(), policy_logits_RV)
    return kl_R
