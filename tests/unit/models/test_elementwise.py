"""Hand-written backward passes against autograd's, and against finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vico.models.elementwise import rms_norm


def naive_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    values = x.double()
    return values / (values.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("shape", [(7, 1, 24), (5, 1, 3, 8), (0, 1, 16)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    # Largest errors measured: 4e-7 in float32, 2e-3 in bfloat16 (half a step at 1 is 3.9e-3).
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    grad = torch.randn(shape, generator=generator).to(dtype)
    outputs = []
    for function in (rms_norm, naive_rms_norm):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = function(*leaves, 1e-3)
        out.backward(grad.to(out.dtype))
        outputs.append((out, leaves[0].grad, leaves[1].grad))
    assert outputs[0][0].dtype == dtype
    for value, expected in zip(*outputs, strict=True):
        assert value.shape == expected.shape
        if value.numel():
            assert _error(value, expected) < tolerance


def test_rms_norm_of_a_strided_view() -> None:
    """Queries and keys come as slices of the fused projection."""
    generator = torch.Generator().manual_seed(0)
    mixed, grad = (
        torch.randn(6, 1, 2, 24, generator=generator),
        torch.randn(6, 1, 2, 8, generator=generator),
    )
    weight = torch.ones(8)
    leaves = [mixed.clone().requires_grad_(), mixed.clone().requires_grad_()]
    rms_norm(leaves[0][..., 8:16], weight, 1e-6).backward(grad)
    F.rms_norm(leaves[1][..., 8:16], (8,), weight, 1e-6).backward(grad)
    assert _error(leaves[0].grad, leaves[1].grad) < 1e-6  # measured 1e-7


def _error(value: Tensor, expected: Tensor) -> float:
    return (
        (value.double() - expected.double()).abs().max() / expected.abs().max().clamp(min=1e-6)
    ).item()
