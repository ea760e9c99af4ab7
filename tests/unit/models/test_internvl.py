"""Visual tokens under a plan, pixel normalisation and which parameters a plan touches."""

import pytest
import torch
from torch import Tensor

from megatron_vico.config.registry import get_model_config
from megatron_vico.models.internvl import VisionEncoder
from tests.toy_models import make_encoder, random_tiles


@pytest.fixture(scope="module")
def encoder(single_process_groups: None) -> VisionEncoder:
    return make_encoder(get_model_config("toy"))


@pytest.fixture(scope="module")
def features(encoder: VisionEncoder) -> Tensor:
    with torch.no_grad():
        return encoder.features(encoder.normalise(random_tiles(encoder.model, 7)))


def tile_by_tile(encoder: VisionEncoder, features_NPD: Tensor, plan: list[bool]) -> Tensor:
    """The naive version."""
    parts = []
    for index, compressed in enumerate(plan):
        connector = encoder.connector_16x if compressed else encoder.connector_4x
        parts.append(connector(features_NPD[index : index + 1])[0])
    return torch.cat(parts)


@pytest.mark.parametrize("plan", ["0000000", "1111111", "0110100", "1000001", "1111011"])
def test_visual_tokens_equal_tile_by_tile(
    encoder: VisionEncoder, features: Tensor, plan: str
) -> None:
    compressed = [digit == "1" for digit in plan]
    results = []
    for forward in (
        lambda x: encoder.visual_tokens(x, torch.tensor(compressed)),
        lambda x: tile_by_tile(encoder, x, compressed),
    ):
        leaf = features.clone().requires_grad_()
        tokens = forward(leaf)
        tokens.square().sum().backward()
        results.append((tokens, leaf.grad))
    (tokens, grad), (expected, expected_grad) = results
    assert tokens.shape == (sum(1 if each else 4 for each in compressed), 128)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)  # measured 2e-6
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-5)  # measured 1.7e-6


def test_no_plan_is_the_plan_that_compresses_nothing(
    encoder: VisionEncoder, features: Tensor
) -> None:
    assert torch.equal(
        encoder.visual_tokens(features, None),
        encoder.visual_tokens(features, torch.zeros(7).bool()),
    )


@pytest.mark.parametrize("plan", [None, torch.zeros(0).bool()])
def test_no_tiles(encoder: VisionEncoder, features: Tensor, plan: Tensor | None) -> None:
    assert encoder.visual_tokens(features[:0], plan).shape == (0, 128)
    assert encoder.features(encoder.normalise(random_tiles(encoder.model, 0))).shape == (0, 16, 96)


@pytest.mark.parametrize(
    ("plan", "untouched"),
    [(None, "connector_16x"), ("0000000", "connector_16x"), ("1111111", "connector_4x")],
)
def test_a_connector_without_tiles_gets_no_gradient(
    encoder: VisionEncoder, features: Tensor, plan: str | None, untouched: str
) -> None:
    encoder.zero_grad()
    compressed = None if plan is None else torch.tensor([digit == "1" for digit in plan])
    encoder.visual_tokens(features, compressed).sum().backward()
    touched = {
        name.split(".")[0] for name, param in encoder.named_parameters() if param.grad is not None
    }
    assert touched == {"connector_4x", "connector_16x"} - {untouched}


def test_pixels_are_normalised_as_torchvision_does(encoder: VisionEncoder) -> None:
    tiles = random_tiles(encoder.model, 2)
    expected = torch.stack(
        [
            (tiles[:, channel].double() / 255 - mean) / std
            for channel, (mean, std) in enumerate(
                zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
            )
        ],
        dim=1,
    )
    torch.testing.assert_close(
        encoder.normalise(tiles).double(), expected, rtol=0, atol=1e-6
    )  # measured 4e-7
    assert tiles.dtype == torch.uint8


def test_features_without_gradients_have_no_graph(encoder: VisionEncoder) -> None:
    kept: list[Tensor] = []
    with (
        torch.no_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
    ):
        features_NPD = encoder.features(encoder.normalise(random_tiles(encoder.model, 2)))
    assert not features_NPD.requires_grad
    assert kept == []
