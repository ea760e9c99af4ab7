"""Answers conversations: tiles -> ViT -> router -> plan -> prompt -> decoding.

The only place where a compression plan can depend on what the tiles look like. Later questions of a
conversation see the model's own earlier answers.

Shapes: N tiles of a conversation, P patches of a tile, D channels of the ViT, V visual tokens.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_vico.config.registry import ModelConfig
from megatron_vico.data.encode.expand import expand
from megatron_vico.data.encode.image_file import open_image
from megatron_vico.data.encode.sample_encoder import EncodingSettings, SampleEncoder
from megatron_vico.data.encode.tokenizer import Tokenizer
from megatron_vico.data.samples import ConversationSample, EncodedSample, IntArray
from megatron_vico.errors import SampleError
from megatron_vico.inference.plans import PlanSource, Prompt, PromptImage, Routing, plan_of
from megatron_vico.inference.pruning import Pruning
from megatron_vico.inference.sampling import Sampling
from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.models.language_model import LanguageModel
from megatron_vico.models.to_device import to_device

_PATCHES_AT_ONCE = 1 << 16
"""Of the ViT: 64 tiles of 1024; more is no faster and takes memory."""


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
    """Visual tokens the language model was given, counted in the prompt; mean over layers where the
    plan drops them between layers."""

    token_ids: tuple[tuple[int, ...], ...] = ()
    """Of each answer, without the end mark."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptPart:
    """What the language model reads before an answer, under a plan."""

    token_ids: IntArray
    visual_positions: IntArray
    visual_tokens_VH: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedPrompt:
    """A prompt under its plan."""

    parts: tuple[PromptPart, ...]
    compressed_N: Tensor
    probability_N: Tensor | None
    num_visual_tokens: int
    """As in `Answers`."""

    num_tokens: int
    """Of all parts, visual ones too; those of the first layer."""

    pruning: Pruning | None = None
    """Parts are read again for each question then: what is kept depends on it."""


class Engine:
    """One model with its tokenizer, on one device, or with its layers over tensor ranks.

    Every one of these does the same: tokens are chosen from gathered logits, by each for itself.
    """

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

        The language model has no pipeline, and was built with attention "sdpa"; settings are those
        of training; at most `batch_size` conversations are answered together. Answers end with the
        tokenizer's end mark, or with one of `stop_ids`.
        """
        self.stop_ids = frozenset({tokenizer.eos_id, *stop_ids})
        self.encoder = encoder.eval()
        self.language_model = language_model.eval()
        self.tokenizer = tokenizer
        self.model = model
        self.settings = settings
        self.batch_size = batch_size
        self.max_len = model.language.max_position_embeddings
        """Tokens of a conversation, answers included."""

        self.device = encoder.vit.class_token.device
        self._sample_encoder = SampleEncoder(tokenizer=tokenizer, settings=settings)

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.language_model.tp_group.rank() == 0

    def prompt(
        self,
        sample: ConversationSample,
        *,
        history: Literal["own", "given"] = "own",
        tiles_of_image: Sequence[int] | None = None,
    ) -> Prompt:
        """Tile the images and encode the questions.

        Args:
            sample: a conversation.
            history: whether later questions see the model's own answers, or those of the
                conversation, whose last question alone is answered then.
            tiles_of_image: as in `SampleEncoder.encode_prompt`.

        Raises:
            SampleError: if an image is broken, or there is no question.
        """
        turns = sample.turns
        if history == "own":
            turns = tuple(turn for turn in turns if turn.role != "gpt")
        if not any(turn.role == "human" for turn in turns):
            raise SampleError(
                f"sample {sample.key!r}: no turn from 'human'; there is nothing to answer."
            )
        parts = self._sample_encoder.encode_prompt(
            replace(sample, turns=turns), tiles_of_image=tiles_of_image
        )
        counts = [count for part in parts for count in part.tiles_per_image]
        images = [_image(*each) for each in zip(sample.images, counts, strict=True)]
        return Prompt(parts=tuple(parts), images=tuple(images))

    def route(self, prompts: Sequence[Prompt], routing: Routing) -> list[tuple[Tensor, Tensor]]:
        """Ask the router only: the plan, [N] bool, and p_compress, [N] float32, of each."""
        with torch.inference_mode():
            return [self._decide(each, self._features(each), routing) for each in prompts]

    def answer(
        self,
        prompts: Sequence[Prompt],
        *,
        plan: PlanSource | Sequence[Tensor],
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
    ) -> Iterator[Answers]:
        """Answer every question of every conversation, in their order.

        Args:
            prompts: conversations.
            plan: one source for all, or a plan for each.
            max_new_tokens: longest answer.
            sampling: None: greedily, with no other end than this.

        Raises:
            SampleError: if a plan does not fit its conversation, or that is too long.
        """
        from megatron_vico.inference.scheduler import Request, Scheduler

        sampling = replace(sampling or Sampling(), max_new_tokens=max_new_tokens)
        plans = plan if isinstance(plan, Sequence) and not isinstance(plan, str) else None
        scheduler = Scheduler(self)
        requests = [
            Request(
                prompt=prompt,
                plan=plan if plans is None else plans[number],  # type: ignore[arg-type]
                sampling=sampling,
            )
            for number, prompt in enumerate(prompts)
        ]
        for request in requests:
            scheduler.add(request)
        for request in requests:
            while request.finish_reason is None:
                scheduler.step()
            if request.error is not None:
                raise request.error
            assert request.routed is not None
            yield Answers(
                texts=tuple(
                    each.text if sampling.stop else self.tokenizer.decode(each.ids)
                    for each in request.answers
                ),
                compressed_N=request.routed.compressed_N,
                probability_N=request.routed.probability_N,
                num_visual_tokens=request.routed.num_visual_tokens,
                token_ids=tuple(tuple(answer.ids) for answer in request.answers),
            )

    def routed(self, prompt: Prompt, plan: PlanSource) -> RoutedPrompt:
        """A prompt's tiles through the ViT, once, and each through the connector of its plan.

        Each conversation by itself: what is decided for it does not depend on others.

        Raises:
            SampleError: as `plan_of`.
        """
        features_NPD = self._features(prompt)
        probability_N = None
        pruning = plan if isinstance(plan, Pruning) else None
        if isinstance(plan, Routing):
            compressed_N, probability_N = self._decide(prompt, features_NPD, plan)
        else:
            compressed_N = plan_of("none" if isinstance(plan, Pruning) else plan, prompt).cpu()
        counts = [part.num_tiles for part in prompt.parts]
        each = zip(
            prompt.parts, features_NPD.split(counts), compressed_N.split(counts), strict=True
        )
        parts = tuple(self._part(*of_part) for of_part in each)
        num_visual = sum(len(part.visual_positions) for part in parts)
        return RoutedPrompt(
            parts=parts,
            compressed_N=compressed_N,
            probability_N=probability_N,
            num_visual_tokens=round(pruning.mean_kept(num_visual)) if pruning else num_visual,
            num_tokens=sum(len(part.token_ids) for part in parts),
            pruning=pruning,
        )

    def _part(self, part: EncodedSample, features_NPD: Tensor, compressed_N: Tensor) -> PromptPart:
        stream = expand(
            [part],
            plan=compressed_N,
            tokens_kept=self.model.visual_tokens_per_tile,
            tokens_compressed=self.model.compressed_tokens_per_tile,
            image_token_id=self.tokenizer.image_token_id,
        )
        return PromptPart(
            token_ids=stream.token_ids.numpy(),
            visual_positions=stream.visual_positions.numpy(),
            visual_tokens_VH=self.encoder.visual_tokens(features_NPD, compressed_N),
        )

    def _features(self, prompt: Prompt) -> Tensor:
        tiles = np.concatenate([part.tiles for part in prompt.parts])
        at_once = max(1, _PATCHES_AT_ONCE // self.model.vision.num_patches)
        return torch.cat(
            [
                self.encoder.features(self.encoder.normalise(to_device(chunk, self.device)))
                for chunk in torch.from_numpy(tiles).split(at_once)
            ]
        )

    def _decide(
        self, prompt: Prompt, features_NPD: Tensor, routing: Routing
    ) -> tuple[Tensor, Tensor]:
        tiles_per_image = prompt.tiles_per_image if routing.granularity == "image" else None
        return routing.decide(self.encoder.vir(features_NPD, tiles_per_image).cpu())


def _image(content: bytes, num_tiles: int) -> PromptImage:
    with open_image(content) as image:
        width, height = image.size
    return PromptImage(
        width=width,
        height=height,
        sha256=hashlib.sha256(content).hexdigest(),
        num_tiles=num_tiles,
    )
