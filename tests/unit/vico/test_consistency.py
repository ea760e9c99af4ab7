"""Eq. 1 against float64, also where the KL is tiny, and exactly 0 where both sides are equal."""

import pytest
import torch
from torch import Tensor

from megatron_vico.vico.consistency import forward_kl, weighted_sum


def naive_kl(reference: Tensor, policy: Tensor) -> Tensor:
    """The textbook formula, in float64."""
    log_q, log_p = reference.double().log_softmax(-1), policy.double().log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


@pytest.mark.parametrize(
    ("noise", "value_tolerance"),
    [(30.0, 3e-6), (1.0, 2e-6), (1e-1, 3e-6), (1e-2, 1e-5), (1e-3, 6e-5), (1e-4, 1e-3)],
)
def test_value_and_gradient_against_float64(noise: float, value_tolerance: float) -> None:
    """KL from 112 to 6e-9 nats. Measured: value 8e-7, 7e-7, 8e-7, 3e-6, 2e-5, 3e-4; gradient
    1.4e-6, then < 6e-7."""
    torch.manual_seed(0)
    reference = 3 * torch.randn(8, 20_000)
    policy = (reference + noise * torch.randn_like(reference)).requires_grad_()
    policy64 = policy.detach().double().requires_grad_()
    kl, kl64 = forward_kl(reference, policy), naive_kl(reference, policy64)
    kl.sum().backward()
    kl64.sum().backward()
    assert ((kl - kl64) / kl64).abs().max() < value_tolerance
    assert policy.grad is not None
    assert policy64.grad is not None
    assert (policy.grad - policy64.grad).norm() / policy64.grad.norm() < 4e-6


def test_rows_without_common_support() -> None:
    policy = torch.tensor([[-200.0, 0.0]], requires_grad=True)
    kl = forward_kl(torch.tensor([[0.0, -200.0]]), policy)
    kl.sum().backward()
    assert kl.item() == pytest.approx(200.0)
    assert policy.grad is not None
    assert policy.grad.tolist() == [[-1.0, 1.0]]


def test_the_naive_fp32_value_is_wrong_where_ours_is_right() -> None:
    """Why the formula is written as a sum of non-negative terms."""
    torch.manual_seed(0)
    reference = 3 * torch.randn(4, 20_000)
    policy = reference + 3e-4 * torch.randn_like(reference)
    truth = naive_kl(reference, policy)
    log_q, log_p = reference.log_softmax(-1), policy.log_softmax(-1)
    plain = (log_q.exp() * (log_q - log_p)).sum(-1)
    assert ((plain - truth) / truth).abs().max() > 0.05
    assert ((forward_kl(reference, policy) - truth) / truth).abs().max() < 1e-3


def test_equal_rows_give_exactly_zero() -> None:
    logits = torch.randn(5, 1000)
    policy = logits.clone().requires_grad_()
    kl = forward_kl(logits, policy)
    kl.sum().backward()
    assert policy.grad is not None
    assert torch.equal(kl, torch.zeros(5))
    assert torch.equal(policy.grad, torch.zeros_like(policy))


def test_the_reference_gets_no_gradient() -> None:
    reference, policy = (
        torch.randn(2, 10, requires_grad=True),
        torch.randn(2, 10, requires_grad=True),
    )
    forward_kl(reference, policy).sum().backward()
    assert reference.grad is None
    assert policy.grad is not None


def test_no_rows() -> None:
    policy = torch.randn(0, 10, requires_grad=True)
    loss = weighted_sum(forward_kl(torch.randn(0, 10), policy), torch.zeros(0))
    loss.backward()
    assert float(loss.detach()) == 0.0


def test_weighted_sum_is_the_mean_over_tokens_then_samples() -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 10.0])
    weight = torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]) / 2
    assert weighted_sum(values, weight).item() == pytest.approx((2.0 + 10.0) / 2)


def test_mismatch_and_coarse_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="same response rows"):
        forward_kl(torch.randn(2, 5), torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"policy logits are torch\.bfloat16"):
        forward_kl(torch.randn(2, 5), torch.randn(2, 5).bfloat16())
