"""Eq. 1 of the ViCO paper: the policy answers from compressed tiles as the reference does from
uncompressed ones.

Shape suffixes: R response rows, V vocabulary.
"""

import torch
from torch import Tensor


class _ForwardKL(torch.autograd.Function):
    """KL(q || p) per row, and its gradient p - q, both right where q and p are almost equal.

    With x = log q - log p, the value is taken as sum q (e^-x - 1 + x), whose terms are all >= 0,
    and the gradient as q (e^-x - 1). As differences of two large numbers both lose their digits
    just where ViCO trains: the value is off by 8 % at 1.5e-6 nats, and Eq. 2 divides two such
    values. x itself comes from the difference of the logits, which is exact for near logits, and
    not from two rounded log-softmaxes.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, reference_RV: Tensor, policy_RV: Tensor
    ) -> Tensor:
        delta_RV = policy_RV - reference_RV
        log_q_RV = reference_RV.log_softmax(dim=-1)
        q_RV = log_q_RV.exp()
        # log-sum-exp of the policy minus that of the reference; the first form keeps its digits
        # near 0.
        near_R = (q_RV * torch.expm1(delta_RV)).sum(dim=-1).log1p()
        far_R = (log_q_RV + delta_RV).logsumexp(dim=-1)
        shift_R = torch.where(delta_RV.abs().amax(dim=-1) < 1, near_R, far_R)
        x_RV = shift_R.unsqueeze(-1) - delta_RV
        # Where q vanishes and p does not, q (e^-x - 1) would be 0 times infinity.
        p_minus_q_RV = torch.where(
            x_RV.abs() < 1, q_RV * torch.expm1(-x_RV), (log_q_RV - x_RV).exp() - q_RV
        )
        ctx.save_for_backward(p_minus_q_RV)
        return (p_minus_q_RV + q_RV * x_RV).sum(dim=-1)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_R: Tensor) -> tuple[None, Tensor]:
        (p_minus_q_RV,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return None, p_minus_q_RV * grad_R.unsqueeze(-1)


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


def weighted_sum(values_R: Tensor, weight_R: Tensor) -> Tensor:
    """The 1/N mean over a sample's response tokens and the mean over samples of Eq. 1, as one
    weighted sum.

    Args:
        values_R: [R] float32, loss of each response row.
        weight_R: [R] float32, 1 / (response tokens of the row's sample * samples in the global
            batch).

    Returns:
        Scalar float32; 0 where there are no rows.
    """
    return (values_R * weight_R).sum()
