"""Both decision rules on the cases the released models are known by."""

import torch
from torch import Tensor

from megatron_vico.vico.routing import compress_probability, flash_rule, paper_rule


def logits_of(probabilities: list[float]) -> Tensor:
    p = torch.tensor(probabilities)
    return torch.stack([p.log(), (1 - p).log()], dim=1)


def test_index_zero_is_compress() -> None:
    assert compress_probability(torch.tensor([[5.0, -5.0]])).item() > 0.99


def test_paper_rule_is_half_and_strict() -> None:
    assert paper_rule(logits_of([0.2, 0.500001, 0.9])).tolist() == [False, True, True]
    assert paper_rule(torch.zeros(1, 2)).tolist() == [False]


def test_flash_rule_spares_the_quantile_itself() -> None:
    gates = [0.55, 0.6, 0.7, 0.95]
    assert flash_rule(
        logits_of(gates), relative_threshold=0.1, absolute_threshold=0.5
    ).tolist() == [
        False,
        True,
        True,
        True,
    ]
    assert flash_rule(
        logits_of(gates), relative_threshold=0.6, absolute_threshold=0.5
    ).tolist() == [
        False,
        False,
        True,
        True,
    ]


def test_flash_rule_never_compresses_a_single_tile() -> None:
    assert flash_rule(
        logits_of([0.95]), relative_threshold=0.0, absolute_threshold=0.0
    ).tolist() == [False]


def test_flash_rule_floor() -> None:
    plan = flash_rule(
        logits_of([0.1, 0.2, 0.3, 0.6]), relative_threshold=0.1, absolute_threshold=0.5
    )
    assert plan.tolist() == [False, False, False, True]


def test_flash_rule_without_tiles() -> None:
    assert flash_rule(torch.zeros(0, 2), relative_threshold=0.1, absolute_threshold=0.5).shape == (
        0,
    )
