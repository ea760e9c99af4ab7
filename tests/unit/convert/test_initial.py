"""Initial values: the distributions of the modules themselves, and each tensor a function of seed
and name alone."""

import pytest
import torch

from megatron_vico.convert.initial import initial_tensor
from megatron_vico.models.connector import Connector4x, Connector16x
from megatron_vico.models.vir import ViR

VISION_SIZE, LANGUAGE_SIZE = 96, 160


def built(seed: int) -> dict[str, torch.Tensor]:
    """Fresh modules' parameters, as torch initialises them, under the table's names."""
    torch.manual_seed(seed)
    modules = {
        "connector_4x": Connector4x(vision_size=VISION_SIZE, language_size=LANGUAGE_SIZE),
        "connector_16x": Connector16x(vision_size=VISION_SIZE, language_size=LANGUAGE_SIZE),
        "vir": ViR(hidden_size=VISION_SIZE, num_heads=4),
    }
    return {
        f"encoder.{prefix}.{name}": tensor.detach()
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def test_distributions_are_those_of_the_modules() -> None:
    expected = built(seed=0)
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    for name, tensor in expected.items():
        found = initial_tensor(name, shapes=shapes, seed=1)
        assert found.shape == tensor.shape
        if tensor.unique().numel() == 1:  # ones or zeros
            assert torch.equal(found, tensor), name
            continue
        count = tensor.numel()
        # In units of 1 / sqrt(count), over all names: measured 1.1 (deviation), 3.6 (mean); of the
        # bound, 3.6 / count.
        assert abs(found.std() / tensor.std() - 1) < 5 * (1 / count) ** 0.5, name
        assert abs(found.mean()) < 5 * tensor.std() / count**0.5, name
        if not name.endswith("query_token"):  # uniform: the largest value is the bound, nearly
            assert float(found.abs().max()) == pytest.approx(
                float(tensor.abs().max()), rel=30 / count
            ), name


def test_other_distributions_would_show() -> None:
    """That the test above can fail."""
    name = "encoder.connector_16x.linear_1.weight"
    one = built(seed=0)[name]
    other = torch.randn_like(one) * one.std() * 1.1
    assert abs(other.std() / one.std() - 1) > 5 * (1 / one.numel()) ** 0.5


def test_a_value_depends_on_seed_and_name_alone() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in built(seed=0).items()}
    one, other = "encoder.vir.gating.block1.0.weight", "encoder.vir.gating.block2.0.weight"
    first = initial_tensor(one, shapes=shapes, seed=1)
    torch.rand(3)
    assert torch.equal(first, initial_tensor(one, shapes={one: shapes[one]}, seed=1))
    assert not torch.equal(first, initial_tensor(one, shapes=shapes, seed=2))
    assert not torch.equal(first, initial_tensor(other, shapes=shapes, seed=1))
