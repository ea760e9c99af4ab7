"""Both decision rules on the cases the released models are known by."""

import pytest
import torch
from torch import Tensor

from megatron_vico.vico.routing import compress_probability, flash_rule, paper_rule


def logits_of(probabilities: list[float]) -> Tensor:
    p = torch.tensor(probabilities)
    return torch.stack([p.log(), (1 - p).log()], dim=1)


def test_index_zero_is_compress_and_the_paper_rule_is_half_and_strict() -> None:
    assert compress_probability(torch.tensor([[5.0, -5.0]])).item() > 0.99
    assert paper_rule(logits_of([0.2, 0.500001, 0.9])).tolist() == [False, True, True]
    assert paper_rule(torch.zeros(1, 2)).tolist() == [False]


@pytest.mark.parametrize(
    ("gates", "relative", "absolute", "expected"),
    [
        # The tile that is itself the quantile is never compressed, hence no single one.
        ([0.55, 0.6, 0.7, 0.95], 0.1, 0.5, [False, True, True, True]),
        ([0.55, 0.6, 0.7, 0.95], 0.6, 0.5, [False, False, True, True]),
        ([0.95], 0.0, 0.0, [False]),
        ([0.1, 0.2, 0.3, 0.6], 0.1, 0.5, [False, False, False, True]),
        ([], 0.1, 0.5, []),
    ],
)
def test_flash_rule(
    gates: list[float], relative: float, absolute: float, expected: list[bool]
) -> None:
    plan = flash_rule(logits_of(gates), relative_threshold=relative, absolute_threshold=absolute)
    assert plan.tolist() == expected
