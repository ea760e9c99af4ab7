"""Logits against transformers' InternVL on the same random weights."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_vico.config.registry import ModelConfig, get_model_config
from tests.parity.hf_weights import inputs_of, transformers_model
from tests.toy_models import make_encoder, make_language_model, random_tiles


def combine(vision: str, language: str) -> ModelConfig:
    return replace(
        get_model_config(vision), name="combined", language=get_model_config(language).language
    )


MODELS = {
    "300M kind, dense": combine("toy", "toy"),
    "300M kind, experts": combine("toy-moe", "toy-moe"),
    "6B kind, dense": combine("toy-6b", "toy-6b"),
    "6B kind, experts": combine("toy-6b", "toy-moe"),
}


def documents(model: ModelConfig) -> list[Tensor]:
    """Token ids with 2, 0 and 3 tiles, each of its own length, image tokens in place."""
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> Tensor:
        return torch.randint(6, 512, (length,), generator=generator)

    tile = torch.full((model.visual_tokens_per_tile,), model.image_token_id)
    return [
        torch.cat([text(4), tile, tile, text(9)]),
        text(6),
        torch.cat([text(2), tile, text(3), tile, tile, text(20)]),
    ]


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_logits_equal_transformers(kind: str, single_process_groups: None) -> None:
    model = MODELS[kind]
    encoder, language_model = make_encoder(model).eval(), make_language_model(model).eval()
    hf = transformers_model(encoder, language_model)
    pixels = encoder.normalise(random_tiles(model, 5))
    samples = documents(model)
    inputs = inputs_of(samples, model.image_token_id)
    rows = language_model(inputs, encoder.visual_tokens(encoder.features(pixels), None))
    logits = language_model.response_logits(rows)
    expected = [
        hf(input_ids=sample[None], pixel_values=tiles).logits[0]
        for sample, tiles in zip(samples, (pixels[:2], None, pixels[2:]), strict=True)
    ]
    assert logits.std() > 0.5  # a comparison of noughts would say nothing
    torch.testing.assert_close(logits, torch.cat(expected), rtol=0, atol=2e-5)  # measured 4e-6


@torch.no_grad()
@pytest.mark.parametrize("name", ["toy", "toy-6b"])
def test_vision_features_equal_transformers(name: str, single_process_groups: None) -> None:
    model = get_model_config(name)
    encoder = make_encoder(model).eval()
    hf = transformers_model(encoder, make_language_model(model).eval())
    pixels = encoder.normalise(random_tiles(model, 3))
    features = encoder.features(pixels)
    expected = hf.model.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(features, expected, rtol=0, atol=2e-5)  # measured 4e-6
    tokens = encoder.visual_tokens(features, None)
    projected = hf.model.get_image_features(pixel_values=pixels).pooler_output.flatten(0, 1)
    torch.testing.assert_close(tokens, projected, rtol=0, atol=1e-5)  # measured 1.3e-6
