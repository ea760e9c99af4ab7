"""Answers conversations in batches: tiles -> ViT -> router -> plan -> prompt -> greedy decoding.

The only place where a compression plan can depend on what the tiles look like. Later questions of a
conversation see the model's own earlier answers.

Shapes: N tiles of a conversation, V visual tokens, B conversations of a batch, S tokens.
"""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import batched
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_vico.config.registry import ModelConfig
from megatron_vico.data.encode.conversation import IMAGE_TAG, encode_follow_up
from megatron_vico.data.encode.expand import expand
from megatron_vico.data.encode.sample_encoder import EncodingSettings, SampleEncoder
from megatron_vico.data.encode.tokenizer import Tokenizer
from megatron_vico.data.samples import ConversationSample, EncodedSample, IntArray
from megatron_vico.errors import SampleError
from megatron_vico.models.attention_layout import KVCache
from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.models.language_model import LanguageModel
from megatron_vico.vico.compression_plan import plan_all, plan_none
from megatron_vico.vico.routing import (
    FLASH_ABSOLUTE_THRESHOLD,
    FLASH_RELATIVE_THRESHOLD,
    compress_probability,
    flash_rule,
    paper_rule,
)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How ViR's scores become a plan."""

    rule: Literal["paper", "flash"] = "paper"
    """paper: p_compress > 0.5; flash: the released models' rule, over all tiles of one
    conversation."""

    granularity: Literal["tile", "image"] = "tile"
    """What the router was trained to decide on."""

    relative_threshold: float = FLASH_RELATIVE_THRESHOLD
    """Quantile of the flash rule."""

    absolute_threshold: float = FLASH_ABSOLUTE_THRESHOLD
    """Least probability of the flash rule."""


PlanSource = Literal["none", "all"] | Sequence[Tensor] | Routing
"""Nothing or everything compressed, a given plan [N] bool for each conversation, or the router."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """A conversation ready to be answered."""

    first: EncodedSample
    """Up to the first answer, with all tiles; one image token a tile."""

    follow_ups: tuple[IntArray, ...] = ()
    """Tokens between two answers, from the newline after `<|im_end|>` on; one entry per later
    question."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """What the model said, and what it saw."""

    texts: tuple[str, ...]
    """One per question."""

    compressed_N: Tensor
    """[N] bool, the plan that was used."""

    probability_N: Tensor | None
    """[N] float32, the router's p_compress; None where the plan did not come from the router."""

    num_visual_tokens: int
    """Visual tokens the language model was given, counted in the prompt."""


class Engine:
    """One model with its tokenizer, on one device."""

    def __init__(
        self,
        *,
        encoder: VisionEncoder,
        language_model: LanguageModel,
        tokenizer: Tokenizer,
        model: ModelConfig,
        settings: EncodingSettings,
        batch_size: int = 64,
        stop_ids: Sequence[int] = (),
    ) -> None:
        """Put the model into evaluation mode.

        The language model is a whole one (no pipeline), built with attention "sdpa"; settings are
        those of training; `batch_size` conversations are answered together. Answers end with the
        tokenizer's end mark, or with one of `stop_ids`.
        """
        self.stop_ids = frozenset({tokenizer.eos_id, *stop_ids})
        self.encoder = encoder.eval()
        self.language_model = language_model.eval()
        self.tokenizer = tokenizer
        self.model = model
        self.batch_size = batch_size
        self._sample_encoder = SampleEncoder(tokenizer=tokenizer, settings=settings)
        self._device = encoder.vit.class_token.device

    def prompt(self, sample: ConversationSample) -> Prompt:
        """Tile the images and encode the questions; answers that the conversation has are left out.

        Raises:
            SampleError: if an image is broken, there is no question, or a later question has an
                image.
        """
        questions = [number for number, turn in enumerate(sample.turns) if turn.role == "human"]
        if not questions:
            raise SampleError(
                f"sample {sample.key!r}: no turn from 'human'; there is nothing to answer."
            )
        later = [sample.turns[number].text for number in questions[1:]]
        if any(IMAGE_TAG in text for text in later):
            raise SampleError(
                f"sample {sample.key!r}: an image comes after the first answer; put all {IMAGE_TAG}"
                " tags into the first question."
            )
        first = replace(sample, turns=sample.turns[: questions[0] + 1])
        return Prompt(
            first=self._sample_encoder.encode_prompt(first),
            follow_ups=tuple(encode_follow_up(text, tokenizer=self.tokenizer) for text in later),
        )

    def route(self, prompts: Sequence[Prompt], routing: Routing) -> list[tuple[Tensor, Tensor]]:
        """Ask the router only: the plan, [N] bool, and p_compress, [N] float32, of each."""
        routed = []
        with torch.inference_mode():
            for batch in batched(prompts, self.batch_size):
                routed += self._route(batch, self._features(batch), routing)
        return routed

    def answer(
        self, prompts: Sequence[Prompt], *, plan: PlanSource, max_new_tokens: int = 64
    ) -> Iterator[Answers]:
        """Answer every question of every conversation, greedily; one conversation after the other.

        Raises:
            SampleError: if a given plan has another number of tiles than its conversation.
        """
        start = 0
        for batch in batched(prompts, self.batch_size):
            given = plan if isinstance(plan, str | Routing) else plan[start : start + len(batch)]
            start += len(batch)
            # Not on while the caller looks at an answer: it would leak into the caller's code.
            with torch.inference_mode():
                answers = self._answer_batch(batch, plan=given, max_new_tokens=max_new_tokens)
            yield from answers

    def _answer_batch(
        self, batch: Sequence[Prompt], *, plan: PlanSource, max_new_tokens: int
    ) -> list[Answers]:
        features_NPD = self._features(batch)
        routed: list[tuple[Tensor, Tensor | None]]
        if isinstance(plan, Routing):
            routed = [*self._route(batch, features_NPD, plan)]
        else:
            routed = [(each, None) for each in _given_plans(batch, plan)]
        streams = [
            expand(
                [prompt.first],
                plan=each.cpu(),
                tokens_kept=self.model.visual_tokens_per_tile,
                tokens_compressed=self.model.compressed_tokens_per_tile,
                image_token_id=self.tokenizer.image_token_id,
            )
            for prompt, (each, _) in zip(batch, routed, strict=True)
        ]
        plan_N = torch.cat([each for each, _ in routed]).cpu()
        visual_tokens_VH = self.encoder.visual_tokens(features_NPD, plan_N)
        num_turns = 1 + max(len(prompt.follow_ups) for prompt in batch)
        decoder = _Decoder(
            self.language_model,
            batch=len(batch),
            # Room for the padded segments of all turns, and for every answer with its end mark.
            max_len=max(len(stream.token_ids) for stream in streams)
            + sum(_longest(batch, turn) for turn in range(num_turns - 1))
            + num_turns * (max_new_tokens + 2),
            tokenizer=self.tokenizer,
            stop_ids=self.stop_ids,
            device=self._device,
        )
        turns = [
            decoder.answer(
                [stream.token_ids.numpy() for stream in streams],
                max_new_tokens,
                visual_tokens_VH,
                [stream.visual_positions.numpy() for stream in streams],
            )
        ]
        for turn in range(num_turns - 1):
            segments = [
                prompt.follow_ups[turn] if turn < len(prompt.follow_ups) else np.empty(0, np.int64)
                for prompt in batch
            ]
            turns.append(decoder.answer(segments, max_new_tokens))
        return [
            Answers(
                texts=tuple(map(self.tokenizer.decode, own[: 1 + len(prompt.follow_ups)])),
                compressed_N=compressed_N,
                probability_N=probability_N,
                num_visual_tokens=len(stream.visual_positions),
            )
            for prompt, own, (compressed_N, probability_N), stream in zip(
                batch, zip(*turns, strict=True), routed, streams, strict=True
            )
        ]

    def _features(self, batch: Sequence[Prompt]) -> Tensor:
        tiles = torch.from_numpy(np.concatenate([prompt.first.tiles for prompt in batch]))
        return self.encoder.features(self.encoder.normalise(tiles.to(self._device)))

    def _route(
        self, batch: Sequence[Prompt], features_NPD: Tensor, routing: Routing
    ) -> list[tuple[Tensor, Tensor]]:
        by_image = [count for prompt in batch for count in prompt.first.tiles_per_image]
        tiles_per_image = by_image if routing.granularity == "image" else None
        logits_N2 = self.encoder.vir(features_NPD, tiles_per_image).cpu()
        routed = []
        for logits in logits_N2.split([prompt.first.num_tiles for prompt in batch]):
            if routing.rule == "paper":
                compressed_N = paper_rule(logits)
            else:
                compressed_N = flash_rule(
                    logits,
                    relative_threshold=routing.relative_threshold,
                    absolute_threshold=routing.absolute_threshold,
                )
            routed.append((compressed_N, compress_probability(logits)))
        return routed


class _Decoder:
    """A batch of conversations in one KV cache; conversations may differ in length."""

    def __init__(
        self,
        language_model: LanguageModel,
        *,
        batch: int,
        max_len: int,
        tokenizer: Tokenizer,
        stop_ids: Set[int],
        device: torch.device,
    ) -> None:
        self._language_model = language_model
        self._stop_ids = stop_ids
        self._tokenizer = tokenizer
        self._cache: KVCache = language_model.new_cache(batch, max_len)
        self._device = device
        self._unseen: list[list[int]] = [[] for _ in range(batch)]
        """Tokens said but not yet run through the model; they go before the next segment."""

    def answer(
        self,
        segments: Sequence[IntArray],
        max_new_tokens: int,
        visual_tokens_VH: Tensor | None = None,
        visual_positions: Sequence[IntArray] = (),
    ) -> list[list[int]]:
        """Read one segment of each conversation, and answer.

        Args:
            segments: ids of each conversation; an empty one ends the conversation.
            max_new_tokens: longest answer.
            visual_tokens_VH: of all conversations, for the first segments.
            visual_positions: where they go in each segment.

        Returns:
            Ids of each answer, without the end mark.
        """
        talks = [segment.size > 0 for segment in segments]
        answers: list[list[int]] = [[] for _ in segments]
        if not any(talks):
            return answers
        tokens = [
            [*unseen, *segment.tolist()] if segment.size else []
            for unseen, segment in zip(self._unseen, segments, strict=True)
        ]
        next_B = self._read(tokens, visual_tokens_VH, visual_positions)
        for count in range(1, max_new_tokens + 1):
            said = next_B.tolist()  # the only wait for the device in a token
            for row, token in enumerate(said):
                talks[row] = talks[row] and token not in self._stop_ids
                if talks[row]:
                    answers[row].append(token)
            if count == max_new_tokens or not any(talks):
                break
            # Those that have ended run along with padding, which their length does not count.
            pad_id = self._tokenizer.pad_id
            fed = [token if goes_on else pad_id for token, goes_on in zip(said, talks, strict=True)]
            next_B = self._step(torch.tensor(fed)[:, None], torch.tensor(talks).long())
        self._unseen = [
            # An answer cut off has its last token left to run; every answer gets its end mark.
            [*(answer[-1:] if cut_off else []), self._tokenizer.eos_id]
            for answer, cut_off in zip(answers, talks, strict=True)
        ]
        return answers

    def _read(
        self,
        tokens: list[list[int]],
        visual_tokens_VH: Tensor | None,
        visual_positions: Sequence[IntArray],
    ) -> Tensor:
        lens = [len(ids) for ids in tokens]
        longest = max(lens)
        token_ids_BS = torch.tensor(
            [ids + [self._tokenizer.pad_id] * (longest - len(ids)) for ids in tokens]
        )
        index = None
        if visual_tokens_VH is not None:
            rows = [row * longest + positions for row, positions in enumerate(visual_positions)]
            index = torch.from_numpy(np.concatenate(rows)).to(self._device)
        return self._step(
            token_ids_BS,
            torch.tensor(lens),
            visual_tokens_VH,
            index,
        )

    def _step(
        self,
        token_ids_BS: Tensor,
        num_new_B: Tensor,
        visual_tokens_VH: Tensor | None = None,
        visual_index: Tensor | None = None,
    ) -> Tensor:
        """Run new tokens; the most likely next one of each conversation, [B] int64.

        Ids and counts are on the host, and nothing is read back from the device.
        """
        position_ids_BS = self._cache.lengths[:, None] + torch.arange(token_ids_BS.size(1))
        last_B = (num_new_B - 1).clamp_min(0)
        hidden_BSH = self._language_model.forward_batch(
            token_ids_BS.to(self._device),
            position_ids_BS.to(self._device),
            visual_tokens_VH,
            visual_index,
            self._cache,
            num_new_B=num_new_B,
        )
        rows_BH = hidden_BSH[
            torch.arange(len(last_B), device=self._device), last_B.to(self._device)
        ]
        # The model's vocabulary is larger than the tokenizer's (151,936 and 151,678).
        return self._language_model.response_logits(rows_BH)[
            :, : self._tokenizer.vocab_size
        ].argmax(dim=-1)


def _given_plans(
    batch: Sequence[Prompt], plan: Literal["none", "all"] | Sequence[Tensor]
) -> Sequence[Tensor]:
    if not isinstance(plan, str):
        return plan
    make = plan_all if plan == "all" else plan_none
    return [make(prompt.first.num_tiles) for prompt in batch]


def _longest(batch: Sequence[Prompt], turn: int) -> int:
    return max(
        prompt.follow_ups[turn].size if turn < len(prompt.follow_ups) else 0 for prompt in batch
    )
