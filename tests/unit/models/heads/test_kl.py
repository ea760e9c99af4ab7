"""The fused KL head against the textbook formula in float64, its one-process twin, and its promises
about memory."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vico.vico.consistency import forward_kl
from tests.peak_bytes import PeakBytes
from tests.unit.models.heads.kl_heads import (
    Heads,
    emulate_wide_products,
    errors_against_float64,
    grads_of,
    make_heads,
    naive_kl,
    naive_kl_loss,
    our_rows,
    ours,
    with_main_grad,
)


@pytest.mark.parametrize("mean_kl", [0.2, 1e-2, 1e-3])
@pytest.mark.parametrize(
    ("vocab_size", "logit_std", "dtype", "tolerance"),
    [
        (500, 0.5, torch.float32, 1e-5),
        (151_936, 3.0, torch.float32, 1e-4),
        (151_936, 3.0, torch.bfloat16, 5e-3),
    ],
)
def test_gradients_against_float64(
    vocab_size: int, logit_std: float, dtype: torch.dtype, tolerance: float, mean_kl: float
) -> None:
    """Largest measured error at 0.2, 1e-2, 1e-3: toy 5e-7, 7e-7, 2e-6; large 2e-6 (8e-6 on another
    CPU), 1.6e-5, 4e-5; bf16 1.6e-3.

    In bf16 it is the rounding of the rows' gradient that is handed back; the weight's main gradient
    is within 1.3e-5.
    """
    heads = make_heads(
        12, 32, vocab_size, mean_kl=mean_kl, logit_std=logit_std, padding=64, dtype=dtype
    )
    assert 0.5 < float(our_rows(heads, chunk_rows=5).mean()) / mean_kl < 2
    if dtype == torch.bfloat16:
        heads = with_main_grad(heads)
    assert max(errors_against_float64(heads, ours(heads, chunk_rows=5))) < tolerance


@pytest.mark.parametrize("mean_kl", [0.2, 1e-2, 1e-3])
def test_nothing_is_lost_but_by_the_logits_own_rounding(mean_kl: float) -> None:
    """Against logits from the same float32 products, with all that follows in float64. Measured:
    1.00 times."""
    heads, floor = (make_heads(12, 32, 500, mean_kl=mean_kl) for _ in range(2))
    logits_p = floor.policy_rows_RH @ floor.policy_weight_VH.T
    logits_q = floor.reference_rows_RH @ floor.reference_weight_VH.T
    floor_loss = (naive_kl(logits_q.double(), logits_p.double()) * floor.row_weight_R).sum()
    floors = errors_against_float64(floor, floor_loss)
    assert max(errors_against_float64(heads, ours(heads))[1:]) < 1.3 * max(floors[1:])


@pytest.mark.parametrize("mean_kl", [0.2, 1e-2, 1e-3])
def test_logits_rounded_to_bf16_fail_the_same_bound(mean_kl: float) -> None:
    """Measured, rows and weight: 2.5 and 4 % at 0.2; 9 and 15 % at 1e-2; 27 and 48 % at 1e-3."""
    heads = make_heads(12, 32, 151_936, mean_kl=mean_kl, dtype=torch.bfloat16)
    assert min(errors_against_float64(heads, naive_kl_loss(heads))[1:]) > 5e-3


@pytest.mark.parametrize(
    ("mean_kl", "tolerance"), [(1e3, 2e-6), (1.0, 5e-6), (1e-3, 5e-5), (1e-7, 2e-3)]
)
def test_rows_equal_one_block_of_whole_logits(mean_kl: float, tolerance: float) -> None:
    """Products of 4 rows and of 9 round differently. Measured: 5e-7, 1.0e-6, 1.2e-5, 4e-4."""
    heads = make_heads(9, 16, 300, mean_kl=mean_kl, padding=12)
    found = our_rows(heads, chunk_rows=4)
    with torch.no_grad():
        logits_p = heads.policy_rows_RH @ heads.policy_weight_VH[:300].T
        expected = forward_kl(heads.reference_rows_RH @ heads.reference_weight_VH[:300].T, logits_p)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize(
    ("mean_kl", "tolerance"), [(1e-2, 5e-6), (1e-4, 1e-5), (1e-6, 1e-4), (1e-8, 1e-3)]
)
def test_exact_logits(mean_kl: float, tolerance: float) -> None:
    """Heads of identity: rows are logits, no product rounds. Eq. 2 divides two such values.

    Measured: values 1.2e-7, 1.9e-7, 4e-7, 4e-5; gradients 8e-7, then 4e-7. From two log-sum-exps
    instead of the near form the gradient would be off by 1.3e-6, 6e-6, 1e-4, 4e-4.
    """
    rows = make_heads(9, 1000, 1, mean_kl=mean_kl, logit_std=1.0)
    heads = replace(
        rows,
        policy_rows_RH=(3 * rows.policy_rows_RH.detach()).requires_grad_(),
        reference_rows_RH=3 * rows.reference_rows_RH,
        policy_weight_VH=torch.eye(1000).requires_grad_(),
        reference_weight_VH=torch.eye(1000),
        vocab_size=1000,
    )
    value, rows_grad, _ = errors_against_float64(heads, ours(heads))
    assert value < tolerance
    assert rows_grad < 2e-6


def test_far_rows() -> None:
    """Logits that differ by hundreds: the near forms overflow and must not be looked at.

    Measured: value 4e-8; gradients 7e-4, since float32 logits of this size are off by up to 1e-4.
    """
    heads = make_heads(6, 16, 200, mean_kl=1e4)
    errors = errors_against_float64(heads, ours(heads))
    assert errors[0] < 1e-6
    assert max(errors) < 3e-3


def test_equal_models_give_exactly_zero() -> None:
    heads = make_heads(7, 16, 100, mean_kl=0.0, padding=4)
    assert torch.equal(heads.policy_rows_RH, heads.reference_rows_RH)
    loss = ours(heads, chunk_rows=3)
    loss.backward()
    assert loss.item() == 0.0
    assert not any(grad.any() for grad in grads_of(heads))


@settings(max_examples=40)
@given(
    num_rows=st.integers(0, 9),
    chunk_rows=st.integers(1, 12),
    vocab_size=st.integers(2, 40),
    padding=st.integers(0, 5),
    mean_kl=st.sampled_from([2.0, 1e-2, 1e-4]),
)
def test_the_chunk_never_changes_the_result(
    num_rows: int, chunk_rows: int, vocab_size: int, padding: int, mean_kl: float
) -> None:
    """Beyond rounding: products of few and of many rows differ by 2e-7 of a logit. Measured: 1e-5
    of a gradient."""
    results = []
    for chunk in (chunk_rows, 1024):
        heads = make_heads(num_rows, 8, vocab_size, mean_kl=mean_kl, padding=padding)
        loss = ours(heads, chunk_rows=chunk)
        loss.backward()
        results.append((loss.detach(), *grads_of(heads)))
    for chunked, whole in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-6)
    assert not results[0][2][vocab_size:].any()


@pytest.mark.parametrize("num_rows", [0, 1, 6])
def test_main_grad_takes_what_would_be_returned_and_accumulates(num_rows: int) -> None:
    plain = make_heads(num_rows, 16, 50, padding=6)
    ours(plain, chunk_rows=4).backward()
    _, expected = grads_of(plain)
    fused = with_main_grad(plain)
    weight: Any = fused.policy_weight_VH
    fired: list[int] = []
    weight.register_post_accumulate_grad_hook(lambda _: fired.append(1))
    for calls in (1, 2):
        ours(fused, chunk_rows=4).backward()
        torch.testing.assert_close(weight.main_grad, calls * expected, rtol=1e-6, atol=1e-9)
        assert weight.grad_added_to_main_grad
        assert len(fired) == calls, "DDP's hook hangs on a gradient, of which there was none"
        assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("num_rows", [0, 6])
def test_megatrons_ddp_takes_the_gradient(num_rows: int, single_process_groups: None) -> None:
    """Its hook adds nothing of the gradient that stands in, and finds its bucket complete, with no
    rows too."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    plain, heads = (make_heads(num_rows, 16, 50) for _ in range(2))
    ours(plain).backward()
    weight: Any = torch.nn.Parameter(heads.policy_weight_VH.detach())
    module = torch.nn.Module()
    module.weight = weight
    ddp = DistributedDataParallel(
        TransformerConfig(
            num_layers=1, hidden_size=16, num_attention_heads=1, calculate_per_token_loss=True
        ),
        DistributedDataParallelConfig(overlap_grad_reduce=True, grad_reduce_in_fp32=True),
        module,
    )
    for _ in range(3):
        ddp.zero_grad_buffer()
        ours(replace(heads, policy_weight_VH=weight)).backward()
        ddp.finish_grad_sync()
        assert torch.equal(weight.main_grad, grads_of(plain)[1])


def test_the_gradient_that_is_added_all_the_same_is_zero() -> None:
    """`zero_out_wgrad`: what DDP does for a head tied to the embedding."""
    weight: Any = (heads := with_main_grad(make_heads(3, 16, 50))).policy_weight_VH
    weight.zero_out_wgrad = True
    ours(heads).backward()
    assert not weight.grad.any()


def test_a_frozen_head_and_evaluation_leave_main_grad_alone() -> None:
    heads = with_main_grad(make_heads(3, 16, 50))
    weight: Any = heads.policy_weight_VH
    with torch.no_grad():
        assert not ours(heads).requires_grad
    weight.requires_grad_(False)
    with PeakBytes() as seen:
        ours(heads).backward()
    assert seen.products == 3, "two heads and the rows' gradient"
    assert not weight.main_grad.any()
    assert not hasattr(weight, "grad_added_to_main_grad")
    assert grads_of(heads)[0].any()


def test_rows_without_gradient() -> None:
    heads, whole = make_heads(3, 16, 50), make_heads(3, 16, 50)
    with PeakBytes() as seen:
        ours(replace(heads, policy_rows_RH=heads.policy_rows_RH.detach())).backward()
    assert seen.products == 3, "two heads and the weight's gradient"
    ours(whole).backward()
    assert heads.policy_weight_VH.grad is not None
    assert torch.equal(heads.policy_weight_VH.grad, grads_of(whole)[1])


def test_what_comes_in_multiplies_what_is_handed_back() -> None:
    one, three = make_heads(5, 16, 50), make_heads(5, 16, 50)
    ours(one).backward()
    (3 * ours(three)).backward()
    for grad, expected in zip(grads_of(three), grads_of(one), strict=True):
        torch.testing.assert_close(grad, 3 * expected)


def test_the_loss_is_not_a_view() -> None:
    """Megatron's schedules free the last stage's output and refuse views."""
    loss = ours(make_heads(2, 8, 20))
    assert loss._base is None
    assert loss.shape == ()
    assert loss.dtype == torch.float32


def seen_by(heads: Heads, step: Callable[[Heads], Tensor]) -> PeakBytes:
    with PeakBytes(*heads.tensors()) as seen:
        step(heads).backward()
    return seen


def test_memory_does_not_grow_with_the_rows() -> None:
    """Peak above inputs, in bytes, at 32 rows a chunk; the gradient of the rows and the values are
    outputs.

    Measured: 65,280 more, all of it outputs, at 1,024 rows than at 64; the textbook's has
    57,344,000 there.
    """
    hidden, small, large = 16, 64, 1024

    def growth(step: Callable[[Heads], Tensor]) -> int:
        at_small, at_large = (
            seen_by(with_main_grad(make_heads(rows, hidden, 2000)), step).peak
            for rows in (small, large)
        )
        return at_large - at_small

    outputs = (large - small) * (hidden + 1) * 4
    assert growth(lambda heads: ours(heads, chunk_rows=32)) <= outputs
    assert growth(naive_kl_loss) > 50 * outputs


def test_four_products_a_chunk_and_no_more() -> None:
    heads = make_heads(10, 16, 50)
    assert seen_by(heads, lambda heads: ours(heads, chunk_rows=4)).products == 3 * 4


@pytest.mark.parametrize("main_grad", ["fused", "returned"])
def test_the_branch_for_gpus(main_grad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 products into float32, which the CPU lacks, emulated. Measured: value 5e-6, gradients
    2.5e-3."""
    widened = emulate_wide_products(monkeypatch)
    heads = make_heads(9, 64, 5000, mean_kl=1e-3, padding=8, dtype=torch.bfloat16)
    if main_grad == "fused":
        heads = with_main_grad(heads)
    errors = errors_against_float64(heads, ours(heads, chunk_rows=4))
    assert widened == ["mm"] * 2 * 3 + ["mm", "addmm"], "both heads a chunk, and both gradients"
    assert errors[0] < 1e-4
    assert max(errors) < 5e-3


def test_the_branch_for_gpus_fits_their_operators() -> None:
    """Shapes and dtypes only, on torch's meta device."""
    heads = make_heads(9, 16, 50, padding=6, dtype=torch.bfloat16).to("meta")
    heads = with_main_grad(heads)
    loss = ours(heads, chunk_rows=4)
    loss.backward()
    assert loss.dtype == torch.float32
    assert grads_of(heads)[0].dtype == torch.bfloat16
    assert heads.policy_weight_VH.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: {"reference_rows_RH": h.reference_rows_RH[:3]}, "3 reference rows but 4 policy"),
        (lambda h: {"row_weight_R": h.row_weight_R[:3]}, "row weights of shape"),
        (lambda h: {"reference_rows_RH": h.reference_rows_RH[:, :3]}, "with the same hidden"),
        (
            lambda h: {"policy_rows_RH": h.policy_rows_RH.bfloat16()},
            r"rows are torch\.bfloat16 but the head's weight is torch\.float32",
        ),
        (lambda h: {"vocab_size": 53}, "fewer than the 53 entries"),
        (lambda h: {"reference_weight_VH": h.reference_weight_VH[:50]}, "split and padded alike"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: Callable[[Heads], dict[str, Any]], message: str
) -> None:
    heads = make_heads(4, 16, 50, padding=2)
    with pytest.raises(ValueError, match=message):
        ours(replace(heads, **change(heads)))
