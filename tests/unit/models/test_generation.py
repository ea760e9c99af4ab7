"""forward_batch, with and without a cache, against the packed forward pass."""

import pytest
import torch
from torch import Tensor

from megatron_vico.config.registry import get_model_config
from megatron_vico.models.language_model import LanguageInputs, LanguageModel
from tests.toy_models import make_language_model

LENS = (11, 5, 8)
VISUAL = ((1, 2, 3), (), (0, 4))  # places of visual tokens in each sample


def sample_tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(6, 512, (length,), generator=generator) for length in LENS]


def packed_rows(model: LanguageModel, visual_tokens: Tensor) -> list[Tensor]:
    """Hidden states [L, H] of each sample from the packed forward pass."""
    starts = (0, 11, 16)
    inputs = LanguageInputs(
        token_ids_T=torch.cat(sample_tokens()),
        visual_positions_V=torch.tensor(
            [
                start + place
                for start, places in zip(starts, VISUAL, strict=True)
                for place in places
            ]
        ),
        cu_seqlens=torch.tensor([0, 11, 16, 24], dtype=torch.int32),
        document_lens=LENS,
        response_rows_R=torch.arange(24),
        shard_len=24,
    )
    return list(model(inputs, visual_tokens).split(list(LENS)))


def padded(samples: list[Tensor], length: int) -> Tensor:
    """[B, S], padded at the right with a token that must not matter."""
    return torch.stack(
        [torch.cat([each, torch.full((length - len(each),), 9)]) for each in samples]
    )


@pytest.fixture(params=["toy", "toy-6b", "toy-moe"])
def model(request: pytest.FixtureRequest, single_process_groups: None) -> LanguageModel:
    return make_language_model(get_model_config(request.param)).eval()


@torch.no_grad()
def test_batch_without_a_cache_equals_packed(model: LanguageModel) -> None:
    visual_tokens = torch.randn(
        5, model.language.hidden_size, generator=torch.Generator().manual_seed(1)
    )
    ids = padded(sample_tokens(), 11)
    index = torch.tensor(
        [sample * 11 + place for sample, places in enumerate(VISUAL) for place in places]
    )
    hidden = model.forward_batch(ids, torch.arange(11).expand(3, -1), visual_tokens, index)
    for row, expected in zip(hidden, packed_rows(model, visual_tokens), strict=True):
        assert _error(row[: len(expected)], expected) < 1e-5  # measured 0


@torch.no_grad()
@pytest.mark.parametrize("prefill", [(7, 2, 5), (7, 5, 8), (11, 5, 8)])
def test_cache_equals_packed_for_samples_of_unequal_length(
    model: LanguageModel, prefill: tuple[int, ...]
) -> None:
    """Prefill a part of each sample, then decode the rest token by token; a sample that has ended
    is decoded on."""
    visual_tokens = torch.randn(
        5, model.language.hidden_size, generator=torch.Generator().manual_seed(1)
    )
    samples = sample_tokens()
    width = max(prefill)
    index = torch.tensor(
        [sample * width + place for sample, places in enumerate(VISUAL) for place in places]
    )
    cache = model.new_cache(3, 16)
    ids = padded([each[:length] for each, length in zip(samples, prefill, strict=True)], width)
    hidden = model.forward_batch(
        ids,
        torch.arange(width).expand(3, -1),
        visual_tokens,
        index,
        cache,
        num_new_B=torch.tensor(prefill),
    )
    rows = [list(row[:length]) for row, length in zip(hidden, prefill, strict=True)]
    assert cache.lengths.tolist() == list(prefill)
    for _ in range(4):
        step = [
            each[len(row)] if len(row) < len(each) else torch.tensor(9)
            for each, row in zip(samples, rows, strict=True)
        ]
        hidden = model.forward_batch(
            torch.stack(step)[:, None], cache.lengths[:, None], cache=cache
        )
        for row, new in zip(rows, hidden, strict=True):
            row.append(new[0])
    for row, expected in zip(rows, packed_rows(model, visual_tokens), strict=True):
        length = min(len(row), len(expected))
        assert _error(torch.stack(row[:length]), expected[:length]) < 1e-5  # measured 6e-7


@torch.no_grad()
def test_later_turns_can_add_several_tokens_at_once(model: LanguageModel) -> None:
    samples = sample_tokens()
    expected = packed_rows(
        model, torch.zeros(0, model.language.hidden_size).new_zeros(5, model.language.hidden_size)
    )
    cache = model.new_cache(3, 16)
    visual = torch.zeros(5, model.language.hidden_size)
    index = torch.tensor(
        [sample * 5 + place for sample, places in enumerate(VISUAL) for place in places]
    )
    first = torch.stack([each[:5] for each in samples])
    model.forward_batch(first, torch.arange(5).expand(3, -1), visual, index, cache)
    cache = cache.select(torch.tensor([0, 2]))  # the second sample has ended
    rest = padded([samples[0][5:], samples[2][5:]], 6)
    hidden = model.forward_batch(
        rest, cache.lengths[:, None] + torch.arange(6), cache=cache, num_new_B=torch.tensor([6, 3])
    )
    assert _error(hidden[0], expected[0][5:]) < 1e-5  # measured 2e-7
    assert _error(hidden[1, :3], expected[2][5:]) < 1e-5  # measured 9e-8
    assert cache.lengths.tolist() == [11, 8]


@torch.no_grad()
def test_a_full_cache_is_an_error(model: LanguageModel) -> None:
    cache = model.new_cache(1, 4)
    with pytest.raises(AssertionError, match="5 tokens in a cache for 4"):
        model.forward_batch(torch.ones(1, 5, dtype=torch.int64), torch.arange(5)[None], cache=cache)


def _error(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).abs().max() / expected.abs().max()).item()
