"""Eq. 1 against float64, also where the KL is tiny, and exactly 0 where both sides are equal.

`forward_kl` is one block on one rank of what the head trains by (tests/unit/models/heads).
"""

import pytest
import torch
from torch import Tensor

from megatron_vico.vico.consistency import block_statistics, forward_kl, normaliser
from tests.unit.models.heads.kl_heads import naive_kl


def near_logits(num_rows: int, noise: float) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    reference = 3 * torch.randn(num_rows, 20_000)
    return reference, reference + noise * torch.randn_like(reference)


def kl_and_gradient(reference: Tensor, policy: Tensor) -> tuple[Tensor, Tensor]:
    policy = policy.clone().requires_grad_()
    kl = forward_kl(reference, policy)
    (gradient,) = torch.autograd.grad(kl.sum(), policy)
    return kl.detach(), gradient


@pytest.mark.parametrize(
    ("noise", "value_tolerance"),
    [(30.0, 3e-6), (1.0, 2e-6), (1e-1, 3e-6), (1e-2, 1e-5), (1e-3, 6e-5), (1e-4, 1e-3)],
)
def test_value_and_gradient_against_float64(noise: float, value_tolerance: float) -> None:
    """KL from 112 to 6e-9 nats. Measured: value 4e-7, in the last two cases 4e-5 and 5e-4;
    gradient 3e-6 in the first, then 3e-7."""
    reference, policy = near_logits(8, noise)
    kl, gradient = kl_and_gradient(reference, policy)
    policy64 = policy.double().requires_grad_()
    kl64 = naive_kl(reference.double(), policy64)
    (gradient64,) = torch.autograd.grad(kl64.sum(), policy64)
    assert ((kl - kl64) / kl64).abs().max() < value_tolerance
    assert (gradient - gradient64).norm() / gradient64.norm() < 4e-6


def test_the_naive_fp32_value_is_wrong_where_ours_is_right() -> None:
    """Why the formula is written as a sum of non-negative terms."""
    reference, policy = near_logits(4, 3e-4)
    truth = naive_kl(reference.double(), policy.double())
    assert ((naive_kl(reference, policy) - truth) / truth).abs().max() > 0.05
    assert ((forward_kl(reference, policy) - truth) / truth).abs().max() < 1e-3


def test_rows_without_common_support() -> None:
    kl, gradient = kl_and_gradient(torch.tensor([[0.0, -200.0]]), torch.tensor([[-200.0, 0.0]]))
    assert kl.item() == pytest.approx(200.0)
    assert gradient.tolist() == [[-1.0, 1.0]]


@pytest.mark.parametrize("num_rows", [5, 0])
def test_equal_rows_give_exactly_zero(num_rows: int) -> None:
    logits = torch.randn(num_rows, 1000)
    kl, gradient = kl_and_gradient(logits, logits)
    assert torch.equal(kl, torch.zeros(num_rows))
    assert torch.equal(gradient, torch.zeros_like(logits))


@pytest.mark.parametrize("noise", [30.0, 1e-3])
def test_parts_of_the_vocabulary_have_the_normaliser_of_the_whole(noise: float) -> None:
    """Five unequal parts, one of them empty. Measured: 3e-8; of the shift 2e-7."""
    reference, policy = near_logits(4, noise)
    sizes = [100, 0, 9_000, 900, 10_000]
    parts = zip(policy.split(sizes, dim=1), reference.split(sizes, dim=1), strict=True)
    found = normaliser(torch.stack([block_statistics(*part) for part in parts]))
    expected_q = reference.double().logsumexp(-1)
    expected_shift = policy.double().logsumexp(-1) - expected_q
    torch.testing.assert_close(found.reference_B.double(), expected_q, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.shift_B.double(), expected_shift, rtol=2e-6, atol=0)


def test_the_reference_gets_no_gradient() -> None:
    reference = torch.randn(2, 10, requires_grad=True)
    policy = torch.randn(2, 10, requires_grad=True)
    forward_kl(reference, policy).sum().backward()
    assert reference.grad is None
    assert policy.grad is not None


def test_mismatch_and_coarse_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="same response rows"):
        forward_kl(torch.randn(2, 5), torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"policy logits are torch\.bfloat16"):
        forward_kl(torch.randn(2, 5), torch.randn(2, 5).bfloat16())
