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
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(num_rows + vocab_size)
    weight = 3 / hidden**0.5 * torch.randn(vocab_size + PADDING, hidden, generator=generator)
    weight[vocab_size:] = 1e4  # whoever looks at padding will know
    return {
        "rows": torch.randn(num_rows, hidden, generator=generator).to(dtype).requires_grad_(),
        "weight": weight.to(dtype).requires_grad_(),
        "labels": torch.randint(vocab_size, (num_rows,), generator=generator),
        "row_weight": torch.rand(num_rows, generator=generator) + 0.5,
    }


def ours(inputs: dict[str, Any], chunk_rows: int = 1024) -> Tensor:
    vocab_size = len(inputs["weight"]) - PADDING
    shard = VocabularyShard(group=None, vocab_size=vocab_size, chunk_rows=chunk_rows)
    loss = CrossEntropy(labels_R=inputs["labels"], shard=shard)
    return head_loss(inputs["rows"], inputs["weight"], inputs["row_weight"], loss=loss)


def errors_against_float64(inputs: dict[str, Any], loss: Tensor) -> list[float]:
    """Backpropagates `loss`; of its value, the rows' gradient and the weight's."""
    loss.backward()
    rows, weight = (inputs[name].detach().double().requires_grad_() for name in ("rows", "weight"))
    each = F.cross_entropy(rows @ weight[:-PADDING].T, inputs["labels"], reduction="none")
    expected = (each * inputs["row_weight"]).sum()
    truth = [expected.detach(), *torch.autograd.grad(expected, (rows, weight))]
    weight_grad = getattr(inputs["weight"], "main_grad", inputs["weight"].grad)
    assert not weight_grad[-PADDING:].any()
    return [
        float((a.double() - b).norm() / b.norm().clamp_min(1e-30))
        for a, b in zip([loss.detach(), inputs["rows"].grad, weight_grad], truth, strict=True)
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
        inputs["weight"].main_grad = torch.zeros(inputs["weight"].shape)
    assert max(errors_against_float64(inputs, ours(inputs, chunk_rows=5))) < tolerance


@settings(max_examples=30)
@given(num_rows=st.integers(0, 9), chunk_rows=st.integers(1, 12), vocab_size=st.integers(2, 40))
def test_any_chunk(num_rows: int, chunk_rows: int, vocab_size: int) -> None:
    """Measured: 4e-7."""
    inputs = make_inputs(num_rows, 8, vocab_size)
    assert max(errors_against_float64(inputs, ours(inputs, chunk_rows))) < 1e-5


def test_three_products_a_chunk_and_memory_of_one() -> None:
    peaks = []
    for num_rows in (64, 512):
        inputs = make_inputs(num_rows, 16, 2000)
        with PeakBytes(*inputs.values()) as seen:
            ours(inputs, chunk_rows=32).backward()
        assert seen.products == num_rows // 32 * 3
        peaks.append(seen.peak)
    # A row: its gradient and its value. Measured: 30,464 bytes, which is the bound.
    assert peaks[1] - peaks[0] <= (512 - 64) * (16 * 4 + 4)


def test_what_does_not_fit_is_refused() -> None:
    inputs = make_inputs(4, 8, 20)
    with pytest.raises(ValueError, match="labels of shape"):
        ours({**inputs, "labels": inputs["labels"][:3]})
    for label in (-100, 20):
        with pytest.raises(RuntimeError, match="outside the vocabulary of 20 entries"):
            ours({**inputs, "labels": torch.full((4,), label)})
