"""From logits to the next token, and from tokens to the text that may be shown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vico.data.encode.tokenizer import Tokenizer
from megatron_vico.models.to_device import to_device


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is drawn, and where it ends; names are those of OpenAI and vLLM."""

    max_new_tokens: int | None = 64
    """None: as many as the context has room for."""

    temperature: float = 0.0
    """0 is greedy."""

    top_p: float = 1.0
    top_k: int = 0
    """0 is no limit."""

    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    """Of this answer alone; all tensor-parallel ranks need the same."""

    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""

    ignore_eos: bool = False
    skip_special_tokens: bool = False


class Chooser:
    """Chooses the tokens of one request, whatever else is in its batch."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._processors = _processors(sampling)
        self.is_argmax = not self._processors and sampling.temperature == 0
        self._generator: torch.Generator | None = None

    def __call__(self, logits_V: Tensor, ids: Sequence[int]) -> Tensor:
        """The next token, a scalar int64; `ids` are those before it, prompt included."""
        scores = logits_V[None].float()
        if self._processors:
            before = to_device(torch.tensor([ids]), logits_V.device)
            for process in self._processors:
                scores = process(before, scores)
        if self._sampling.temperature == 0:
            return scores[0].argmax()
        if self._generator is None:
            self._generator = torch.Generator(logits_V.device).manual_seed(self._sampling.seed)
        return torch.multinomial(scores[0].softmax(-1), 1, generator=self._generator)[0]


def _processors(sampling: Sampling) -> list[Callable[[Tensor, Tensor], Tensor]]:
    found = list[Any]()
    greedy = sampling.temperature == 0
    if greedy and sampling.repetition_penalty == 1:
        return found
    from transformers.generation import logits_process as library  # seconds, for these alone

    if sampling.repetition_penalty != 1:
        found.append(library.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if greedy:
        return found
    if sampling.temperature != 1:
        found.append(library.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        found.append(library.TopKLogitsWarper(sampling.top_k))
    if 0 < sampling.top_p < 1:
        found.append(library.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        found.append(library.MinPLogitsWarper(sampling.min_p))
    return found


class AnswerText:
    """An answer as it grows; ends at the first stop string."""

    def __init__(self, tokenizer: Tokenizer, sampling: Sampling) -> None:
        self.ids: list[int] = []
        self.text = ""
        """What may be shown: no part of a stop string, no half of a character."""

        self.stopped = False
        self._stop = sampling.stop
        self._tokenizer, self._skip = tokenizer, sampling.skip_special_tokens
        self._held = ""
        # The text of ids[before:shown] is out; more of it than that would be decoded in vain.
        # tokenizers' own DecodeStream fails at bytes that are no text.
        self._before = self._shown = 0

    def add(self, token_id: int) -> None:
        """One more token."""
        self.ids.append(token_id)
        told, text = self._decode(self._shown), self._decode(len(self.ids))
        within_a_character = text.endswith("\ufffd") and len(self.ids) - self._shown < 8
        if not within_a_character:
            self._held += text[len(told) :]
            self._before, self._shown = self._shown, len(self.ids)
            self._release()

    def end(self) -> None:
        """Nothing follows: show what was held back."""
        if not self.stopped:
            self._held += self._decode(len(self.ids))[len(self._decode(self._shown)) :]
            self._release()
            self.text, self._held = self.text + self._held, ""

    def _decode(self, stop: int) -> str:
        ids = self.ids[self._before : stop]
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def _release(self) -> None:
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            self.text, self._held, self.stopped = self.text + self._held[: min(found)], "", True
            return
        kept = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - kept
        self.text, self._held = self.text + self._held[:cut], self._held[cut:]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
