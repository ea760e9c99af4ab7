"""forward_batch, with and without a cache, against the packed forward pass."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megatron_vico.config.registry import get_model_config
from megatron_vico.models.language_model import LanguageModel
from tests.toy_models import error, make_language_model, pack

LENS = (11, 5, 8)
STARTS = (0, 11, 16)
VISUAL = ((1, 2, 3), (), (0, 4))  # positions of visual tokens in each sample


def samples() -> list[Tensor]:
    return list(pack(LENS).token_ids_T.split(LENS))


def packed_rows(model: LanguageModel, visual_tokens: Tensor) -> list[Tensor]:
    """Hidden states [L, H] of each sample from the packed forward pass."""
    positions = [start + at for start, places in zip(STARTS, VISUAL, strict=True) for at in places]
    return list(model(pack(LENS, visual_positions=positions), visual_tokens).split(LENS))


def padded(samples: Sequence[Tensor], length: int) -> Tensor:
    """[B, S], padded at the right with a token that must not matter."""
    return torch.stack(
        [torch.cat([each, torch.full((length - len(each),), 9)]) for each in samples]
    )


def visual_index(length: int, visual: Sequence[Sequence[int]] = VISUAL) -> Tensor:
    return torch.tensor(
        [sample * length + at for sample, places in enumerate(visual) for at in places]
    )


@pytest.fixture(params=["toy", "toy-6b", "toy-moe"])
def model(request: pytest.FixtureRequest, single_process_groups: None) -> LanguageModel:
    return make_language_model(get_model_config(request.param)).eval()


@pytest.fixture
def visual_tokens(model: LanguageModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, model.language.hidden_size, generator=generator)


@torch.no_grad()
def test_batch_without_a_cache_equals_packed(model: LanguageModel, visual_tokens: Tensor) -> None:
    ids, positions = padded(samples(), 11), torch.arange(11).expand(3, -1)
    hidden = model.forward_batch(ids, positions, visual_tokens, visual_index(11))
    for row, expected in zip(hidden, packed_rows(model, visual_tokens), strict=True):
        assert error(row[: len(expected)], expected) < 1e-5  # measured 0


@torch.no_grad()
@pytest.mark.parametrize("prefill", [(7, 2, 5), (7, 5, 8), (11, 5, 8)])
def test_cache_equals_packed_for_samples_of_unequal_length(
    model: LanguageModel, visual_tokens: Tensor, prefill: tuple[int, ...]
) -> None:
    """Prefill a part of each sample, then decode the rest token by token; a sample that has ended
    is decoded on."""
    whole, width = samples(), max(prefill)
    cache = model.new_cache(3, 16)
    hidden = model.forward_batch(
        padded([each[:length] for each, length in zip(whole, prefill, strict=True)], width),
        torch.arange(width).expand(3, -1),
        visual_tokens,
        visual_index(width),
        cache,
        num_new_B=torch.tensor(prefill),
    )
    rows = [list(row[:length]) for row, length in zip(hidden, prefill, strict=True)]
    assert cache.lengths.tolist() == list(prefill)
    for _ in range(4):
        step = [
            each[len(row)] if len(row) < len(each) else torch.tensor(9)
            for each, row in zip(whole, rows, strict=True)
        ]
        ids = torch.stack(step)[:, None]
        hidden = model.forward_batch(ids, cache.lengths[:, None], cache=cache)
        for row, new in zip(rows, hidden, strict=True):
            row.append(new[0])
    for row, expected in zip(rows, packed_rows(model, visual_tokens), strict=True):
        length = min(len(row), len(expected))
        assert error(torch.stack(row[:length]), expected[:length]) < 1e-5  # measured 6e-7


@torch.no_grad()
def test_several_tokens_can_be_added_at_once(model: LanguageModel, visual_tokens: Tensor) -> None:
    expected = packed_rows(model, visual_tokens)
    first, _, third = samples()
    cache = model.new_cache(2, 16)
    ids, positions = torch.stack([first[:5], third[:5]]), torch.arange(5).expand(2, -1)
    index = visual_index(5, (VISUAL[0], VISUAL[2]))
    model.forward_batch(ids, positions, visual_tokens, index, cache)
    rest, positions = padded([first[5:], third[5:]], 6), cache.lengths[:, None] + torch.arange(6)
    hidden = model.forward_batch(rest, positions, cache=cache, num_new_B=torch.tensor([6, 3]))
    assert error(hidden[0], expected[0][5:]) < 1e-5  # measured 2e-7
    assert error(hidden[1, :3], expected[2][5:]) < 1e-5  # measured 9e-8
    assert cache.lengths.tolist() == [11, 8]


@torch.no_grad()
def test_a_full_cache_is_an_error(model: LanguageModel) -> None:
    cache = model.new_cache(1, 4)
    with pytest.raises(AssertionError, match="5 tokens in a cache for 4"):
        model.forward_batch(torch.ones(1, 5, dtype=torch.int64), torch.arange(5)[None], cache=cache)
