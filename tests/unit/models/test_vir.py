"""The image-level variant, and the parts of ViR that no gradient reaches."""

import pytest
import torch

from megatron_vico.models.vir import ViR
from tests.toy_models import randomise


@pytest.fixture
def vir() -> ViR:
    return randomise(ViR(hidden_size=24, num_heads=4), seed=0)


@pytest.mark.parametrize(
    "tiles_per_image", [(2, 1, 3, 1), (0, 7), (1,) * 7, (7, 0, 0), (3, 0, 3, 1)]
)
def test_every_tile_gets_the_logits_of_its_image(
    vir: ViR, tiles_per_image: tuple[int, ...]
) -> None:
    features = torch.randn(7, 16, 24, generator=torch.Generator().manual_seed(1))
    expected = [
        vir.gating(vir.pooling(image.reshape(1, -1, 24))).expand(len(image), 2)
        for image in features.split(tiles_per_image)
        if len(image)
    ]
    logits = vir(features, tiles_per_image)
    torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=1e-5)  # measured 1.2e-6


def test_one_tile_an_image_is_the_tile_level_router(vir: ViR) -> None:
    features = torch.randn(5, 16, 24)
    by_image, by_tile = vir(features, [1] * 5), vir(features)
    torch.testing.assert_close(by_image, by_tile, rtol=0, atol=1e-6)  # measured 0


@pytest.mark.parametrize("tiles_per_image", [None, [], [0, 0]])
def test_no_tiles(vir: ViR, tiles_per_image: list[int] | None) -> None:
    assert vir(torch.zeros(0, 16, 24), tiles_per_image).shape == (0, 2)


def test_wrong_counts_are_refused(vir: ViR) -> None:
    with pytest.raises(AssertionError, match=r"\[2, 2\] tiles an image, 5 tiles"):
        vir(torch.zeros(5, 16, 24), [2, 2])


def test_dead_parameters_are_stored_frozen_and_all_others_are_trained(vir: ViR) -> None:
    vir(torch.randn(3, 16, 24)).square().sum().backward()
    dead = {name for name, param in vir.named_parameters() if param.grad is None}
    assert {name.rsplit(".", 1)[0].removesuffix(".out_proj") for name in dead} == {
        f"pooling.{kind}{index}" for kind in ("attn", "norm") for index in (3, 4)
    }
    assert all(param.requires_grad != (name in dead) for name, param in vir.named_parameters())
