"""What decoding asks of the device: one read a token, the token itself."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vico.config.registry import get_model_config
from megatron_vico.inference.engine import _Decoder
from tests.toy_models import make_language_model

TOKENIZER = SimpleNamespace(eos_id=1, pad_id=0, vocab_size=300)


class OnDevice:
    """The tokens of a step, of which nothing but their values can be had, and each time counts."""

    reads = 0

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens

    def tolist(self) -> list[int]:
        OnDevice.reads += 1
        return list(self.tokens)


def decoder_of(model: Any, *, batch: int, device: str) -> _Decoder:
    return _Decoder(
        model,
        batch=batch,
        max_len=9,
        tokenizer=TOKENIZER,
        stop_ids={TOKENIZER.eos_id},
        device=torch.device(device),
    )


def test_a_token_is_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(new_cache=lambda batch, max_len: None)
    decoder = decoder_of(model, batch=3, device="cpu")
    steps = iter([OnDevice(5, 6, 7), OnDevice(8, 1, 9), OnDevice(1, 4, 9), OnDevice(4, 4, 9)])
    fed = []

    def step(token_ids_BS: torch.Tensor, num_new_B: torch.Tensor, *more: object) -> OnDevice:
        fed.append((token_ids_BS[:, -1].tolist(), num_new_B.tolist()))
        return next(steps)

    monkeypatch.setattr(decoder, "_step", step)
    segments = [np.array([3]), np.array([3, 4]), np.empty(0, np.int64)]
    assert decoder.answer(segments, 3) == [[5, 8], [6], []]
    assert OnDevice.reads == 3
    # The third has nothing to say, the second ends first.
    assert fed[1:] == [([5, 6, 0], [1, 1, 0]), ([8, 0, 0], [1, 0, 0])]


def test_a_step_reads_nothing(single_process_groups: None) -> None:
    """On `meta` there are no values to read."""
    model = make_language_model(get_model_config("toy")).eval().to("meta")
    decoder = decoder_of(model, batch=2, device="meta")
    with torch.inference_mode():
        for length, counts in ((4, [4, 2]), (1, [1, 1]), (1, [1, 0])):
            found = decoder._step(torch.zeros(2, length, dtype=torch.int64), torch.tensor(counts))
            assert (found.device.type, found.shape) == ("meta", (2,))
