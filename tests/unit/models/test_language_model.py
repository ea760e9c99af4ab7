"""Recomputation, number formats and the head of the language model."""

import functools
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vico.config.registry import get_model_config
from megatron_vico.config.schema import ParallelOptions, RunConfig, TrainingOptions
from megatron_vico.models import build
from megatron_vico.models.build import (
    build_language_model,
    language_transformer_config,
    padded_vocab_size,
)
from megatron_vico.models.language_model import LanguageModel, VocabularyHead
from megatron_vico.planning.meter import Meter
from tests.toy_models import pack, randomise


def make(name: str, *, bf16: bool = False, **parallel: Any) -> LanguageModel:
    model = get_model_config(name)
    cfg = RunConfig(training=TrainingOptions(bf16=bf16), parallel=ParallelOptions(**parallel))
    config = language_transformer_config(model, cfg)
    return randomise(build_language_model(model, config, attention="sdpa"), seed=0).train()


def gradients(model: LanguageModel) -> dict[str, Tensor]:
    """Of a text-only pack under a frozen embedding: where recomputation can lose them."""
    model.gpt.embedding.requires_grad_(False)
    no_images = torch.zeros(0, model.language.hidden_size)
    logits = model.response_logits(model(pack((9, 12, 7)), no_images))
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weight).sum().backward()
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("name", ["toy", "toy-moe"])
@pytest.mark.parametrize(
    "options",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ("core_attn",)},
    ],
    ids=["full", "core_attn"],
)
def test_recomputation_changes_no_gradient(
    name: str, options: dict[str, Any], single_process_groups: None
) -> None:
    expected, grads = gradients(make(name)), gradients(make(name, **options))
    assert grads.keys() == expected.keys()
    assert "gpt.decoder.layers.0.self_attention.linear_qkv.weight" in grads
    for key, grad in grads.items():
        torch.testing.assert_close(grad, expected[key], rtol=0, atol=0)


@torch.no_grad()
def test_bf16_has_float32_logits_near_the_float32_model(single_process_groups: None) -> None:
    inputs, expected, model = pack((9, 12, 7)), make("toy"), make("toy", bf16=True)
    logits = model.response_logits(model(inputs))
    expected_logits = expected.response_logits(expected(inputs))
    assert model.gpt.output_layer.weight.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    # The product is accumulated in float32: almost no logit is a bfloat16 number.
    assert (logits == logits.bfloat16().float()).float().mean() < 0.05
    # Measured: 0.014.
    assert ((logits - expected_logits).norm() / expected_logits.norm()).item() < 0.02


def test_on_a_gpu_no_logit_costs_a_float32_copy_of_the_head() -> None:
    """As a decoded token's would: of 8B's head, 2.5 GB written and read. Counted on no device."""
    make = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    with Meter() as meter, torch.no_grad():
        head: Any = types.SimpleNamespace(weight=make(51_200, 64))
        rows_B1H = make(3, 1, 64)
        before = meter.total
        logits = VocabularyHead.forward(head, rows_B1H)
        assert (logits.shape, logits.dtype) == ((3, 1, 51_200), torch.float32)
        assert max(meter.counted.peak.values()) == before + logits.nbytes


def test_vocabulary_is_padded_as_megatron_does() -> None:
    assert padded_vocab_size(151936, 1) == 151936
    assert padded_vocab_size(151936, 2) == 152064
    assert padded_vocab_size(151936, 8) == 152576
    assert padded_vocab_size(500, 1) == 512


@pytest.mark.parametrize(
    ("dtype", "attention", "usable", "taken"),
    [
        (torch.bfloat16, "auto", True, True),
        (torch.bfloat16, "auto", False, False),
        (torch.bfloat16, "sdpa", True, False),
        (torch.float32, "auto", True, False),  # its attention would pad a pack, in TF32
    ],
)
def test_where_layers_are_transformer_engines(
    dtype: torch.dtype, attention: Any, usable: bool, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = RunConfig(training=TrainingOptions(bf16=dtype == torch.bfloat16))
    config = language_transformer_config(get_model_config("toy"), cfg)
    assert config.params_dtype == dtype
    monkeypatch.setattr(build, "transformer_engine_usable", lambda: usable)
    assert build.takes_transformer_engine(config, attention) == taken
