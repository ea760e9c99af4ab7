"""Logits against transformers' InternVL on the same random weights."""

import pytest
import torch
from torch import Tensor

from megatron_vico.config.registry import ModelConfig
from tests.parity.hf_weights import inputs_of, transformers_model
from tests.toy_models import KINDS, combine, make_encoder, make_language_model, random_tiles


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
@pytest.mark.parametrize("kind", KINDS, ids=" and ".join)
def test_logits_equal_transformers(kind: tuple[str, str], single_process_groups: None) -> None:
    model = combine(*kind)
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
