"""The Triton kernels of the KL head in Triton's interpreter, on the CPU.

`test_kl_kernels.py` starts pytest on this file with TRITON_INTERPRET=1, which has to be there
before triton is imported."""

import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import start_processes

from megatron_vico.models.heads import kl, kl_kernels, vocabulary
from megatron_vico.vico.consistency import block_statistics, forward_kl, normaliser
from tests.distributed import kl_head_ranks
from tests.unit.models.heads.kl_heads import (
    emulate_wide_products,
    errors_against_float64,
    grads_of,
    make_heads,
    ours,
    with_main_grad,
)

# More than two blocks, and a last one that is nearly empty.
WIDE = 2 * kl_kernels.BLOCK + 7
WIDTHS = [1, 5, kl_kernels.BLOCK - 1, kl_kernels.BLOCK, WIDE]


def logits(width: int, noise: float, *, rows: int = 3) -> tuple[Tensor, Tensor]:
    """The policy's and the reference's."""
    generator = torch.Generator().manual_seed(width)
    reference = 3 * torch.randn(rows, width, generator=generator)
    return reference + noise * torch.randn(rows, width, generator=generator), reference


def kernels_kl(policy: Tensor, reference: Tensor, *, parts: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Value and gradient with the vocabulary split into parts of these widths."""
    pieces = [
        (p.contiguous(), q.contiguous())
        for p, q in zip(policy.split(parts, dim=1), reference.split(parts, dim=1), strict=True)
    ]
    over_all = normaliser(torch.stack([kl_kernels.statistics(*piece) for piece in pieces]))
    ones = torch.ones(len(policy))
    values = [
        kl_kernels.kl_and_gradient(p, q, over_all, scale_C=ones, grad_CV=p) for p, q in pieces
    ]
    return torch.stack(values).sum(dim=0), torch.cat([p for p, _ in pieces], dim=1)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("noise", [1e-4, 1e-2, 0.3, 3.0, 100.0])
def test_against_forward_kl(width: int, noise: float) -> None:
    """In float64. Measured: values 5e-7, gradients 8e-7; 1e-5 where logits are off by hundreds."""
    policy, reference = logits(width, noise)
    exact = policy.double().requires_grad_()
    expected = forward_kl(reference.double(), exact)
    expected.sum().backward()
    values, gradient = kernels_kl(policy.clone(), reference, parts=(width,))
    limit = 3e-5 if noise > 10 else 2e-6
    torch.testing.assert_close(values.double(), expected.detach(), rtol=limit, atol=1e-12)
    assert exact.grad is not None
    assert (gradient - exact.grad).norm() <= limit * exact.grad.norm()


@pytest.mark.parametrize("noise", [1e-4, 0.3])
def test_the_statistics(noise: float) -> None:
    """Measured: 1e-7 of sum e^(q - max)."""
    policy, reference = logits(WIDE, noise)
    found, expected = (
        each(policy, reference) for each in (kl_kernels.statistics, block_statistics)
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_split_vocabulary() -> None:
    """Also a rank with nothing but padding, which has no columns. Measured: 2e-7."""
    policy, reference = logits(WIDE, 1e-2)
    expected, expected_gradient = kernels_kl(policy.clone(), reference, parts=(WIDE,))
    found, gradient = kernels_kl(policy.clone(), reference, parts=(5, WIDE - 5, 0))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert (gradient - expected_gradient).norm() <= 1e-6 * expected_gradient.norm()


def test_equal_models_give_exactly_zero() -> None:
    policy, reference = logits(WIDE, 0.0)
    values, gradient = kernels_kl(policy, reference, parts=(WIDE,))
    assert not values.any()
    assert not gradient.any()


def test_what_is_not_a_number_is_not_hidden() -> None:
    policy, reference = logits(5, 0.1)
    policy[1, 3] = math.nan
    values, _ = kernels_kl(policy, reference, parts=(5,))
    assert values.isnan().tolist() == [False, True, False]


def test_the_gradient_goes_where_it_is_wanted() -> None:
    """Scaled, in bf16 beside the logits, or not at all; memory around it is left alone.

    The interpreter cuts bf16 off, where a GPU rounds.
    """
    policy, reference = logits(WIDE, 0.3)
    over_all = normaliser(kl_kernels.statistics(policy, reference).unsqueeze(0))
    before, around = policy.clone(), torch.full((5, WIDE), 7.0, dtype=torch.bfloat16)
    scale = torch.tensor([1.0, 0.5, 0.0])
    values = kl_kernels.kl_and_gradient(
        policy, reference, over_all, scale_C=scale, grad_CV=around[1:4]
    )
    _, gradient = kernels_kl(policy.clone(), reference, parts=(WIDE,))
    expected = gradient * scale[:, None]
    torch.testing.assert_close(around[1:4].float(), expected, rtol=2**-7, atol=0)
    assert (around[[0, 4]] == 7).all()
    assert torch.equal(policy, before)
    same = kl_kernels.kl_and_gradient(policy, reference, over_all, scale_C=None, grad_CV=policy)
    assert torch.equal(same, values)
    assert torch.equal(policy, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_head(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Chunks of 3 rows in groups of 6, padded columns, `main_grad`, at 2e-3 nats. Measured: value
    1.3e-6, gradients 1.4e-5; from bf16 9e-7 and, as the interpreter cuts off, 4.4e-3."""
    monkeypatch.setattr(kl, "passes_for", lambda logits_CV: kl_kernels)
    monkeypatch.setattr(vocabulary, "WIDE_ROWS", 7)
    emulate_wide_products(monkeypatch)
    heads = with_main_grad(make_heads(8, 64, 1500, mean_kl=2e-3, padding=8, dtype=dtype))
    value, *gradients = errors_against_float64(heads, ours(heads, chunk_rows=3))
    assert value < 1e-4
    assert max(gradients) < (5e-3 if dtype == torch.bfloat16 else 1e-4)
    assert not grads_of(heads)[1][1500:].any()


def test_over_two_ranks(tmp_path: Path) -> None:
    """The head split over the vocabulary, one rank with padding. Measured: 3e-7."""
    start_processes(kernels_on_a_rank, args=(tmp_path,), nprocs=2, start_method="fork")
    for found in (torch.load(tmp_path / f"{rank}.pt") for rank in range(2)):
        assert max(found["loss"], found["rows"], found["weight"]) < 1e-6, found
        assert found["padding"] == found["apart"] == 0
        assert found["collectives"] == {"all_gather_into_tensor": 2, "all_reduce": 1}
        assert found["control"] > 0.1


def kernels_on_a_rank(rank: int, folder: Path) -> None:
    kl.passes_for = lambda logits_CV: kl_kernels
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2
    )
    found = kl_head_ranks.compare(kl_head_ranks.kl, 7, torch.distributed.group.WORLD)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)
