"""Encoded samples to a stage's packed batch: draws the plans, makes both streams and weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from megatron_vico.config.stages import STAGES, Stage
from megatron_vico.data.encode.expand import expand
from megatron_vico.data.pack.balance import EQUAL_COST, PackCost
from megatron_vico.data.pack.plan import Pack
from megatron_vico.data.samples import EncodedSample, Gap, PackedBatch, PackedStream
from megatron_vico.vico import compression_plan


@dataclass(frozen=True, kw_only=True)
class PackBuilder:
    """Makes the packed batch of a stage from encoded samples."""

    stage: Stage
    seed: int
    tokens_kept: int
    tokens_compressed: int
    image_token_id: int
    xi_sampler: Literal["stratified", "bernoulli", "exact-count"] = "stratified"
    router_granularity: Literal["tile", "image"] = "tile"
    views: Literal["training", "validation"] = "training"
    """validation: where a stage compares plans with Eq. 1, a second policy view with everything
    compressed."""

    cost: PackCost = EQUAL_COST
    """What a pack of the stage costs, by which packs are spread over data-parallel ranks."""

    def build(
        self,
        samples: Sequence[EncodedSample],
        *,
        pack: Pack,
        samples_in_global_batch: int,
        own: slice | None = None,
    ) -> PackedBatch:
        """Pack samples: weights, reference stream, and the stage's policy streams.

        Args:
            samples: in the order of `pack.sample_ids`; gaps among them have no rows and no tiles.
            pack: their indices and visits, which seed the compression plans.
            samples_in_global_batch: over all ranks and microbatches.
            own: those to pack, gaps standing for the others; None, all. Plans are those that they
                have in the whole pack.
        """
        questions = self._router_questions(samples, pack)
        plans = self._plans(samples, pack, torch.cat(questions))
        if own is not None:
            assert sum(map(len, questions)) == sum(map(len, questions[own])), "gaps elsewhere"
            samples, questions = samples[own], questions[own]
        question = torch.cat(questions)
        rows_per_sample = np.array(
            [int(sample.is_response.sum()) for sample in samples], dtype=np.int64
        )
        weights = 1.0 / (np.maximum(rows_per_sample, 1) * float(samples_in_global_batch))
        asked_per_sample = torch.tensor([int(each.sum()) for each in questions])
        return PackedBatch(
            keys=tuple(sample.key for sample in samples),
            tiles_per_sample=tuple(sample.num_tiles for sample in samples),
            tiles_per_image=tuple(count for sample in samples for count in sample.tiles_per_image),
            sample_of_row=torch.from_numpy(np.repeat(np.arange(len(samples)), rows_per_sample)),
            labels=torch.from_numpy(np.concatenate([sample.labels for sample in samples])),
            kl_weight=torch.from_numpy(np.repeat(weights.astype(np.float32), rows_per_sample)),
            reference=self._stream(samples, torch.zeros_like(question)),
            policies=tuple(self._stream(samples, plan) for plan in plans),
            router_tiles=question.nonzero().squeeze(1),
            router_tile_sample=torch.arange(len(samples)).repeat_interleave(asked_per_sample),
        )

    def _stream(self, samples: Sequence[EncodedSample], plan: Tensor) -> PackedStream:
        return expand(
            samples,
            plan=plan,
            tokens_kept=self.tokens_kept,
            tokens_compressed=self.tokens_compressed,
            image_token_id=self.image_token_id,
        )

    def _plans(
        self, samples: Sequence[EncodedSample], pack: Pack, question: Tensor
    ) -> tuple[Tensor, ...]:
        plans = STAGES[self.stage].plans
        if plans == "none":
            return ()
        if plans == "one_tile":
            return (torch.zeros_like(question), question)
        xi = self._xi(samples, pack)
        return (xi, torch.ones_like(xi)) if self.views == "validation" else (xi,)

    def _xi(self, samples: Sequence[EncodedSample], pack: Pack) -> Tensor:
        if self.xi_sampler == "stratified":
            return self._stratified(samples, pack)
        plans = []
        for sample, sample_id, visit in zip(samples, pack.sample_ids, pack.visits, strict=True):
            random = compression_plan.generator(self.seed, visit, sample_id, "xi")
            plans.append(
                compression_plan.plan_fraction(
                    sample.tiles_per_image, generator=random, sampler=self.xi_sampler
                )
            )
        return torch.cat(plans)

    def _stratified(self, samples: Sequence[EncodedSample], pack: Pack) -> Tensor:
        # A sample comes once a visit, so the first one names the pack; no other pack draws from
        # this stream.
        random = compression_plan.generator(
            self.seed, pack.visits[0], pack.sample_ids[0], "xi-of-pack"
        )
        # The images of gaps get their shares too: those of the other samples stay what they are.
        images = [
            each.missing_tiles if isinstance(each, Gap) else each.tiles_per_image
            for each in samples
        ]
        plan = compression_plan.plan_stratified(
            [count for each in images for count in each], generator=random
        )
        is_real = torch.tensor([not isinstance(each, Gap) for each in samples])
        return plan[is_real.repeat_interleave(torch.tensor([sum(each) for each in images]))]

    def _router_questions(self, samples: Sequence[EncodedSample], pack: Pack) -> list[Tensor]:
        """The plan of Eq. 2 for each sample of the pack."""
        asks = STAGES[self.stage].plans == "one_tile"

        def ask(sample: EncodedSample, sample_id: int, visit: int) -> Tensor:
            if not asks or not sample.num_tiles:
                return compression_plan.plan_none(sample.num_tiles)
            random = compression_plan.generator(self.seed, visit, sample_id, "router")
            if self.router_granularity == "image":
                return compression_plan.plan_one_image(sample.tiles_per_image, generator=random)
            return compression_plan.plan_one_tile(sample.num_tiles, generator=random)

        return list(map(ask, samples, pack.sample_ids, pack.visits))
