"""The fused cross-entropy head against torch's own in float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vico.models.heads.cross_entropy import CrossEntropy
from megatron_vico.models.heads.vocabulary import VocabularyShard, head_loss
from tests.peak_bytes import PeakBytes

PADDING = 7


def make_inputs(
    num_rows: int, hidden: int, vocab_size: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(num_rows + vocab_size)
    weight = 3 / hidden**0.5 * torch.randn(vocab_size + PADDING, hidden, generator=generator)
    weight[vocab_size:] = 1e4
    return {
        "rows_RH": torch.randn(num_rows, hidden, generator=generator).to(dtype).requires_grad_(),
        "weight_VH": weight.to(dtype).requires_grad_(),
        "labels_R": torch.randint(vocab_size, (num_rows,), generator=generator),
        "row_weight_R": torch.rand(num_rows, generator=generator) + 0.5,
    }


def ours(inputs: dict[str, Tensor], vocab_size: int, chunk_rows: int = 1024) -> Tensor:
    shard = VocabularyShard(group=None, vocab_size=vocab_size, chunk_rows=chunk_rows)
    loss = CrossEntropy(labels_R=inputs["labels_R"], shard=shard)
    return head_loss(inputs["rows_RH"], inputs["weight_VH"], inputs["row_weight_R"], loss=loss)


def naive(inputs: dict[str, Tensor], vocab_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """In float64: the loss and the leaves that its gradients are at."""
    exact = {
        name: inputs[name].detach().double().requires_grad_() for name in ("rows_RH", "weight_VH")
    }
    logits = exact["rows_RH"] @ exact["weight_VH"][:vocab_size].T
    return (
        F.cross_entropy(logits, inputs["labels_R"], reduction="none") * inputs["row_weight_R"]
    ).sum(), exact


def errors(inputs: dict[str, Tensor], loss: Tensor, vocab_size: int) -> list[float]:
    expected, exact = naive(inputs, vocab_size)
    expected.backward()
    found = [
        loss.detach(),
        inputs["rows_RH"].grad,
        getattr(inputs["weight_VH"], "main_grad", inputs["weight_VH"].grad),
    ]
    truth = [expected.detach(), exact["rows_RH"].grad, exact["weight_VH"].grad]
    return [
        float((a.double() - b).norm() / b.norm().clamp_min(1e-30))
        for a, b in zip(found, truth, strict=True)
    ]


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "tolerance"),
    [(500, torch.float32, 1e-5), (151_936, torch.float32, 1e-5), (151_936, torch.bfloat16, 5e-3)],
)
def test_value_and_gradients_against_float64(
    vocab_size: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Largest measured error: 3e-7, 7e-6; in bf16 1.7e-3, of the rows' gradient that is handed back
    rounded."""
    inputs = make_inputs(12, 32, vocab_size, dtype)
    if dtype == torch.bfloat16:
        weight: Any = inputs["weight_VH"]
        weight.main_grad = torch.zeros(weight.shape)
    loss = ours(inputs, vocab_size, chunk_rows=5)
    loss.backward()
    assert max(errors(inputs, loss, vocab_size)) < tolerance
    assert not getattr(inputs["weight_VH"], "main_grad", inputs["weight_VH"].grad)[
        vocab_size:
    ].any()


@settings(max_examples=30, deadline=None)
@given(num_rows=st.integers(0, 9), chunk_rows=st.integers(1, 12), vocab_size=st.integers(2, 40))
def test_any_chunk(num_rows: int, chunk_rows: int, vocab_size: int) -> None:
    """Measured: 4e-7."""
    inputs = make_inputs(num_rows, 8, vocab_size)
    loss = ours(inputs, vocab_size, chunk_rows)
    loss.backward()
    assert max(errors(inputs, loss, vocab_size)) < 1e-5


@pytest.mark.parametrize("num_rows", [0, 5])
def test_main_grad_takes_what_would_be_returned(num_rows: int) -> None:
    plain, fused = make_inputs(num_rows, 16, 50), make_inputs(num_rows, 16, 50)
    weight: Any = fused["weight_VH"]
    weight.main_grad = torch.zeros(weight.shape)
    ours(plain, 50).backward()
    ours(fused, 50).backward()
    assert plain["weight_VH"].grad is not None
    assert torch.equal(weight.main_grad, plain["weight_VH"].grad)
    assert weight.grad_added_to_main_grad
    assert weight.grad is not None


def test_three_products_a_chunk_and_memory_of_one() -> None:
    peaks = []
    for num_rows in (64, 512):
        inputs = make_inputs(num_rows, 16, 2000)
        with PeakBytes(*inputs.values()) as seen:
            ours(inputs, 2000, chunk_rows=32).backward()
        assert seen.products == num_rows // 32 * 3
        peaks.append(seen.peak)
    # A row: its gradient, its value, and its label counted from the shard's first entry. Measured:
    # 34,048 bytes.
    assert peaks[1] - peaks[0] <= (512 - 64) * (16 * 4 + 4 + 8)


def test_what_does_not_fit_is_refused() -> None:
    inputs = make_inputs(4, 8, 20)
    with pytest.raises(ValueError, match="labels of shape"):
        ours({**inputs, "labels_R": inputs["labels_R"][:3]}, 20)
    for label in (-100, 20):
        with pytest.raises(RuntimeError, match="outside the vocabulary of 20 entries"):
            ours({**inputs, "labels_R": torch.full((4,), label)}, 20)
