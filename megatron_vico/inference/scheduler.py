"""Continuous batching: requests join and leave between the steps of one KV cache.

Shapes: B requests of a pass, S tokens, V vocabulary.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_vico.errors import SampleError
from megatron_vico.inference.engine import Engine, PromptPart, RoutedPrompt
from megatron_vico.inference.plans import PlanSource, Prompt
from megatron_vico.inference.pruning import Pruner, Pruning
from megatron_vico.inference.sampling import AnswerText, Chooser, Sampling
from megatron_vico.models.to_device import to_device

PREFILL_TOKENS = 1 << 14
"""Most tokens, padding included, that several prompts may be read with in one pass."""


class TooLongError(SampleError):
    """A conversation that the model's context does not hold; in the words that clients parse."""


def check_length(prompt: int, wanted: int, *, most: int) -> None:
    """Raise TooLongError if a prompt and the answer that is wanted are longer than the context."""
    if prompt + wanted > most:
        raise TooLongError(
            f"This model's maximum context length is {most} tokens. However, you requested"
            f" {prompt + wanted} tokens ({prompt} in the messages, {wanted} in the completion)."
            " Please reduce the length of the messages or completion."
        )


@dataclass(kw_only=True, eq=False)
class Request:
    """A conversation on its way through the engine."""

    prompt: Prompt
    plan: PlanSource
    sampling: Sampling
    progressed: Callable[["Request"], object] | None = None
    """Called when it was admitted, with each token, and at the end."""

    routed: RoutedPrompt | None = None
    answers: list[AnswerText] = field(default_factory=list)
    """One a question; the last one may still grow."""

    num_said: int = 0
    """Tokens said in all answers, end marks included."""

    finish_reason: Literal["stop", "length", "error", "cancelled"] | None = None
    error: Exception | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """queue, encode, prefill, decode."""

    unread: PromptPart | None = None
    """What the model reads next: a part of the prompt, or its own last token."""

    ids: list[int] = field(default_factory=list)
    """All that it read and said."""

    since: float = 0.0
    choose: Chooser | None = None

    def took(self, phase: str) -> None:
        """Count the time since the last call for a phase."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.since
        self.since = now

    def end(self, reason: Literal["stop", "length", "error", "cancelled"]) -> None:
        """Give back what it holds of the device's memory."""
        self.finish_reason, self.unread = reason, None
        if self.routed is not None:
            self.routed = replace(self.routed, parts=())
        if self.progressed is not None:
            self.progressed(self)


class Scheduler:
    """The requests that wait, and those that have a row of the cache: request r has row r."""

    def __init__(self, engine: Engine) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._engine = engine
        self._cache = engine.language_model.new_cache(engine.batch_size, engine.max_len)

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return not (self.waiting or self.running)

    @property
    def cached_tokens(self) -> int:
        """Tokens in the cache."""
        """Mean over layers."""
        return int(self._cache.lengths.sum() - self._cache.dropped.sum() / len(self._cache.dropped))

    def add(self, request: Request) -> None:
        """Put a request at the end of the queue."""
        request.since = time.perf_counter()
        request.choose = Chooser(request.sampling)
        self.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Let go of a request that nobody waits for any more."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.running:
            self._leave(request)
        if request.finish_reason is None:
            request.end("cancelled")

    def fail(self, error: Exception) -> None:
        """End all that run, after a step that did not come to its end."""
        for request in self.running:
            request.error = request.error or error
            request.end("error")
        self.running.clear()
        self._cache.free(slice(None))

    def step(self) -> None:
        """Admit what there is room for, read new parts, and say one token more of each answer."""
        # Not on while the caller looks at an answer: it would leak into the caller's code.
        with torch.inference_mode():
            self._admit()
            groups = self._groups()
            chosen = [self._next_tokens(group) for group in groups]
            # The only wait for the device.
            said = torch.cat(chosen).tolist() if chosen else []
        for request, token in zip(list(chain(*groups)), said, strict=True):
            self._said(request, token)

    def _admit(self) -> None:
        engine, tokens = self._engine, 0
        while self.waiting and len(self.running) < engine.batch_size and tokens < PREFILL_TOKENS:
            request = self.waiting.popleft()
            request.took("queue")
            try:
                routed = engine.routed(request.prompt, request.plan)
                self._check_length(request, routed)
            except Exception as error:
                request.error = error
                request.end("error")
                if isinstance(error, SampleError):
                    continue
                raise
            if engine.device.type == "cuda":
                torch.cuda.synchronize(engine.device)  # for the seconds; once a request
            request.took("encode")
            tokens += routed.num_tokens
            request.routed, request.unread = routed, routed.parts[0]
            self.running.append(request)
            self._start_answer(request)

    def _check_length(self, request: Request, routed: RoutedPrompt) -> None:
        # Several answers are cut where the context ends; one that was asked for is not.
        wanted = request.sampling.max_new_tokens if len(routed.parts) == 1 else 1
        check_length(routed.num_tokens, wanted or 1, most=self._engine.max_len)

    def _start_answer(self, request: Request) -> None:
        assert request.unread is not None
        request.ids += request.unread.token_ids.tolist()
        request.answers.append(AnswerText(self._engine.tokenizer, request.sampling))

    def _groups(self) -> list[list[Request]]:
        """Requests that one pass takes: new ones, those with a later part, those with a token."""
        first = dict[Pruning | None, list[Request]]()
        later, token = list[Request](), list[Request]()
        for request, there in zip(self.running, self._cache.lengths.tolist(), strict=False):
            assert request.routed is not None
            assert request.unread is not None
            if not there:
                first.setdefault(request.routed.pruning, []).append(request)
            else:
                (token if len(request.unread.token_ids) == 1 else later).append(request)
        whole = chain.from_iterable(_not_too_wide(alike) for alike in first.values())
        return [*whole, *_not_too_wide(later), *([token] if token else [])]

    def _next_tokens(self, group: Sequence[Request]) -> Tensor:
        """Run what each has not read; the next token of each, [B] int64, still on the device."""
        engine, device = self._engine, self._engine.device
        rows_B = torch.tensor([self.running.index(request) for request in group])
        parts = [request.unread for request in group if request.unread is not None]
        longest = max(len(part.token_ids) for part in parts)
        ids = np.full((len(parts), longest), engine.tokenizer.pad_id, dtype=np.int64)
        for number, part in enumerate(parts):
            ids[number, : len(part.token_ids)] = part.token_ids
        positions = [row * longest + part.visual_positions for row, part in enumerate(parts)]
        visual_index = torch.from_numpy(np.concatenate(positions))
        visual = None
        if len(visual_index):
            visual = torch.cat(
                [each.visual_tokens_VH for each in parts if len(each.visual_positions)]
            )
        num_new_B = torch.tensor([len(part.token_ids) for part in parts])
        pruner = self._pruner(group, rows_B, num_new_B)
        hidden_BSH = engine.language_model.forward_batch(
            to_device(torch.from_numpy(ids), device),
            to_device(self._cache.lengths[rows_B, None] + torch.arange(longest), device),
            visual,
            to_device(visual_index, device),
            self._cache,
            num_new_B=num_new_B,
            rows_B=rows_B,
            pruner=pruner,
        )
        last_B = (num_new_B if pruner is None else pruner.num_tokens_B) - 1
        numbers_B = torch.arange(len(parts), device=device)
        rows_BH = hidden_BSH[numbers_B, to_device(last_B, device)]
        # The model's vocabulary is larger than the tokenizer's (151,936 and 151,678).
        vocab_size = engine.tokenizer.vocab_size
        logits_BV = engine.language_model.response_logits(rows_BH)[:, :vocab_size]
        next_B = logits_BV.argmax(dim=-1)
        for row, request in enumerate(group):
            assert request.choose is not None
            if not request.choose.is_argmax:
                next_B[row] = request.choose(logits_BV[row], request.ids)
        return next_B

    def _pruner(self, group: Sequence[Request], rows_B: Tensor, num_new_B: Tensor) -> Pruner | None:
        """What drops tokens of those that are read whole; all of a group have the same rule."""
        pruning = group[0].routed.pruning if group[0].routed is not None else None
        if pruning is None or self._cache.lengths[rows_B[0]]:
            return None
        device = self._engine.device
        return Pruner(
            pruning,
            visual_positions=[
                to_device(torch.from_numpy(request.unread.visual_positions), device)
                for request in group
                if request.unread is not None
            ],
            num_tokens_B=num_new_B,
            tp_group=self._engine.language_model.tp_group,
        )

    def _said(self, request: Request, token: int) -> None:
        request.took("decode" if request.num_said else "prefill")
        request.num_said += 1
        answer, sampling = request.answers[-1], request.sampling
        ended = token in self._engine.stop_ids and not sampling.ignore_eos
        if not ended:
            request.ids.append(token)
            answer.add(token)
        row = self.running.index(request)
        full = int(self._cache.lengths[row]) + 1 >= self._engine.max_len
        full = full or len(answer.ids) == sampling.max_new_tokens
        if ended or answer.stopped or full:
            answer.end()
            self._next_part(request, [] if ended else [token])
        else:
            request.unread = _token_part([token])
            if request.progressed is not None:
                request.progressed(request)

    def _next_part(self, request: Request, unread: list[int]) -> None:
        """Go on with the next question behind the answer and its end mark; or leave."""
        assert request.routed is not None
        routed, answer, number = request.routed, request.answers[-1], len(request.answers)
        parts, end = routed.parts, self._engine.tokenizer.eos_id
        if number < len(parts):
            if routed.pruning is None:
                request.unread = _joined(_token_part([*unread, end]), parts[number])
                request.ids = request.ids[: len(request.ids) - len(unread)]
            else:  # by another question other tokens are dropped: all is read again
                said = _token_part([*answer.ids, end])
                request.unread = _joined(_joined(parts[number - 1], said), parts[number])
                parts = (*parts[:number], request.unread, *parts[number + 1 :])
                request.routed, request.ids = replace(routed, parts=parts), []
                self._cache.free(self.running.index(request))
            there = int(self._cache.lengths[self.running.index(request)])
            if there + len(request.unread.token_ids) < self._engine.max_len:
                self._start_answer(request)
                return
        request.answers += [
            AnswerText(self._engine.tokenizer, request.sampling)
            for _ in range(len(parts) - len(request.answers))
        ]
        self._leave(request)
        request.end("stop" if not unread or answer.stopped else "length")

    @torch.inference_mode()
    def _leave(self, request: Request) -> None:
        """Free a row; the last one takes its place, so that decoding reads the cache in place."""
        row, last = self.running.index(request), self.running.pop()
        if last is request:
            self._cache.free(row)
        else:
            self.running[row] = last
            self._cache.move(len(self.running), row)


def _token_part(ids: list[int]) -> PromptPart:
    return PromptPart(
        token_ids=np.array(ids, dtype=np.int64),
        visual_positions=np.empty(0, dtype=np.int64),
        visual_tokens_VH=torch.empty(0),
    )


def _joined(first: PromptPart, second: PromptPart) -> PromptPart:
    return PromptPart(
        token_ids=np.concatenate([first.token_ids, second.token_ids]),
        visual_positions=np.concatenate(
            [first.visual_positions, len(first.token_ids) + second.visual_positions]
        ),
        visual_tokens_VH=torch.cat(
            [each.visual_tokens_VH for each in (first, second) if len(each.visual_positions)]
            or [second.visual_tokens_VH]
        ),
    )


def _not_too_wide(requests: Sequence[Request]) -> list[list[Request]]:
    """Groups whose tokens, padded to their longest, are at most PREFILL_TOKENS."""
    groups = list[list[Request]]()
    longest = 0
    for request in sorted(requests, key=lambda each: _num_unread(each)):
        longest = max(longest, _num_unread(request))
        if groups and (len(groups[-1]) + 1) * longest <= PREFILL_TOKENS:
            groups[-1].append(request)
        else:
            groups.append([request])
    return groups


def _num_unread(request: Request) -> int:
    assert request.unread is not None
    return len(request.unread.token_ids)
