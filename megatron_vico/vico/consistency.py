"""Eq. 1 of the ViCO paper: the policy answers from compressed tiles as the reference does from uncompressed ones.

Shape suffixes: R response rows, V vocabulary.
"""

import torch
from torch import Tensor


class _ForwardKL(torch.autograd.Function):
    """KL(q || p) per row, as a sum of terms that are each >= 0.

    With x = log q - log p, sum q (x - 1 + e^-x) equals sum q x for normalised q and p, but each term is
    non-negative, so nothing cancels when the two distributions are close: as the difference of two log-sum-exps the
    value is off by 8 % at 1.5e-6 nats, and Eq. 2 divides two such values. The gradient has its own short form, p - q.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, reference_RV: Tensor, policy_RV: Tensor) -> Tensor:
        log_q_RV = reference_RV.log_softmax(dim=-1)
        log_p_RV = policy_RV.log_softmax(dim=-1)
        q_RV = log_q_RV.exp()
        ctx.save_for_backward(q_RV, log_p_RV)
        x_RV = log_q_RV - log_p_RV
        return (q_RV * (torch.expm1(-x_RV) + x_RV)).sum(dim=-1)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_R: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        q_RV, log_p_RV = ctx.saved_tensors  # type: ignore[attr-defined]
        return None, (log_p_RV.exp() - q_RV) * grad_R.unsqueeze(-1)


def forward_kl(reference_logits_RV: Tensor, policy_logits_RV: Tensor) -> Tensor:
    """KL(reference || policy) at each response row; the summand of Eq. 1 of the ViCO paper.

    Args:
        reference_logits_RV: [R, V] float32, from the frozen reference on the uncompressed image; gets no gradient.
        policy_logits_RV: [R, V] float32, same rows in the same order, from the policy on the compressed image.

    Returns:
        [R] float32, nats, >= 0; exactly 0, with an exactly zero gradient, where both rows are bitwise equal.

    Raises:
        ValueError: if the two shapes differ, or a dtype is coarser than float32 (bf16 logits put an error of
            20-144 % on the gradient at the KL values ViCO trains at).
    """
    if reference_logits_RV.shape != policy_logits_RV.shape:
        raise ValueError(
            f"reference logits {tuple(reference_logits_RV.shape)} and policy logits {tuple(policy_logits_RV.shape)} "
            "differ in shape; both streams must give the same response rows"
        )
    for name, logits in (("reference", reference_logits_RV), ("policy", policy_logits_RV)):
        if logits.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} logits are {logits.dtype}, expected float32: take the head's product in fp32")
    kl_R: Tensor = _ForwardKL.apply(reference_logits_RV.detach(), policy_logits_RV)  # type: ignore[no-untyped-call]
    return kl_R


def weighted_sum(values_R: Tensor, weight_R: Tensor) -> Tensor:
    """The 1/N mean over a sample's response tokens and the mean over samples of Eq. 1, as one weighted sum.

    Args:
        values_R: [R] float32, loss of each response row.
        weight_R: [R] float32, 1 / (response tokens of the row's sample * samples in the global batch).

    Returns:
        Scalar float32; 0 where there are no rows.
    """
    return (values_R * weight_R).sum()
