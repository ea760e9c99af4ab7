"""Visual tokens under a plan, pixel normalisation and which parameters a plan touches."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_vico.config.registry import get_model_config
from megatron_vico.models.internvl import VisionEncoder
from tests.toy_models import kept_for_backward, make_encoder, random_tiles


@pytest.fixture(scope="module")
def encoder(single_process_groups: None) -> VisionEncoder:
    return make_encoder(get_model_config("toy"))


@pytest.fixture(scope="module")
def features(encoder: VisionEncoder) -> Tensor:
    with torch.no_grad():
        return encoder.features(encoder.normalise(random_tiles(encoder.model, 7)))


def plan_of(digits: str) -> Tensor:
    return torch.tensor([digit == "1" for digit in digits], dtype=torch.bool)


def tile_by_tile(encoder: VisionEncoder, features_NPD: Tensor, plan: Tensor) -> Tensor:
    """The naive version."""
    parts = []
    for index, compressed in enumerate(plan):
        connector = encoder.connector_16x if compressed else encoder.connector_4x
        parts.append(connector(features_NPD[index : index + 1])[0])
    return torch.cat(parts)


@pytest.mark.parametrize("digits", ["0000000", "1111111", "0110100", "1000001", "1111011"])
def test_visual_tokens_equal_tile_by_tile(
    encoder: VisionEncoder, features: Tensor, digits: str
) -> None:
    plan = plan_of(digits)

    def tokens_and_gradient(forward: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = features.clone().requires_grad_()
        tokens = forward(leaf)
        return tokens, *torch.autograd.grad(tokens.square().sum(), leaf)

    tokens, gradient = tokens_and_gradient(lambda leaf: encoder.visual_tokens(leaf, plan))
    expected = tokens_and_gradient(lambda leaf: tile_by_tile(encoder, leaf, plan))
    assert tokens.shape == (4 * 7 - 3 * int(plan.sum()), 128)
    torch.testing.assert_close(tokens, expected[0], rtol=0, atol=1e-5)  # measured 2e-6
    torch.testing.assert_close(gradient, expected[1], rtol=0, atol=1e-5)  # measured 1.7e-6


def test_no_plan_and_no_tiles(encoder: VisionEncoder, features: Tensor) -> None:
    nothing = encoder.visual_tokens(features, plan_of("0000000"))
    assert torch.equal(encoder.visual_tokens(features, None), nothing)
    for plan in (None, plan_of("")):
        assert encoder.visual_tokens(features[:0], plan).shape == (0, 128)
    assert encoder.features(encoder.normalise(random_tiles(encoder.model, 0))).shape == (0, 16, 96)


@pytest.mark.parametrize(
    ("plan", "touched"),
    [
        (None, {"connector_4x"}),
        (plan_of("0000000"), {"connector_4x"}),
        (plan_of("1111111"), {"connector_16x"}),
    ],
)
def test_a_connector_without_tiles_gets_no_gradient(
    encoder: VisionEncoder, features: Tensor, plan: Tensor | None, touched: set[str]
) -> None:
    encoder.zero_grad()
    encoder.visual_tokens(features, plan).sum().backward()
    named = encoder.named_parameters()
    assert {name.split(".")[0] for name, param in named if param.grad is not None} == touched


def test_pixels_are_normalised_as_torchvision_does(encoder: VisionEncoder) -> None:
    tiles = random_tiles(encoder.model, 2)
    of_channels = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double()
    mean, std = of_channels[..., None, None]
    expected = (tiles.double() / 255 - mean) / std
    found = encoder.normalise(tiles).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # measured 4e-7
    assert tiles.dtype == torch.uint8


def test_features_without_gradients_have_no_graph(encoder: VisionEncoder) -> None:
    with torch.no_grad(), kept_for_backward() as kept:
        features_NPD = encoder.features(encoder.normalise(random_tiles(encoder.model, 2)))
    assert not features_NPD.requires_grad
    assert kept == []
