"""The packed batch of a stage from encoded samples: both streams, weights, and the compression
plans that it draws."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from megatron_vico.config.stages import STAGES, Stage
from megatron_vico.data.encode.expand import expand_pack
from megatron_vico.data.load.error_budget import Gap
from megatron_vico.data.pack.balance import EQUAL_COST, PackCost
from megatron_vico.data.pack.plan import Pack
from megatron_vico.data.samples import EncodedSample, PackedBatch, PolicyView
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
    """What a pack of the stage costs, by which `make_loader` spreads the packs over data-parallel
    ranks."""

    def build(
        self,
        samples: Sequence[EncodedSample],
        *,
        pack: Pack,
        samples_in_global_batch: int,
        position: int = 0,
    ) -> PackedBatch:
        """Pack samples: tiles, reference stream, and the stage's policy streams.

        Args:
            samples: encoded, in the order of `pack.sample_ids`; gaps among them have no rows and no
                tiles.
            pack: their indices and visits, which seed the compression plans.
            samples_in_global_batch: samples of the whole step, over all ranks and microbatches.
            position: the pack's place in the step.

        Returns:
            The batch, on the CPU.
        """
        rows_per_sample = np.array(
            [int(sample.is_response.sum()) for sample in samples], dtype=np.int64
        )
        weights = 1.0 / (np.maximum(rows_per_sample, 1) * float(samples_in_global_batch))
        question, router_tile_sample = self._router_question(samples, pack)
        plans = self._plans(samples, pack, question)
        if self.views == "validation" and STAGES[self.stage].plans == "xi":
            plans = (*plans, np.ones_like(question))
        return PackedBatch(
            position=position,
            keys=tuple(sample.key for sample in samples),
            sample_ids=torch.tensor(pack.sample_ids, dtype=torch.int64),
            tiles=torch.from_numpy(np.concatenate([sample.tiles for sample in samples])),
            tiles_per_sample=tuple(sample.num_tiles for sample in samples),
            tiles_per_image=tuple(count for sample in samples for count in sample.tiles_per_image),
            sample_of_row=torch.from_numpy(np.repeat(np.arange(len(samples)), rows_per_sample)),
            labels=torch.from_numpy(np.concatenate([sample.labels for sample in samples])),
            kl_weight=torch.from_numpy(np.repeat(weights.astype(np.float32), rows_per_sample)),
            reference=self._view(samples, np.zeros_like(question)).stream,
            policies=tuple(self._view(samples, plan) for plan in plans),
            router_tiles=torch.from_numpy(np.flatnonzero(question)),
            router_tile_sample=router_tile_sample,
        )

    def _view(self, samples: Sequence[EncodedSample], plan: np.ndarray) -> PolicyView:
        stream = expand_pack(
            samples,
            plan=plan,
            tokens_kept=self.tokens_kept,
            tokens_compressed=self.tokens_compressed,
            image_token_id=self.image_token_id,
        )
        return PolicyView(compressed=torch.from_numpy(plan), stream=stream)

    def _plans(
        self, samples: Sequence[EncodedSample], pack: Pack, question: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        kind = STAGES[self.stage].plans
        if kind == "none":
            return ()
        if kind == "one_tile":
            return (np.zeros_like(question), question)
        if self.xi_sampler == "stratified":
            # A sample comes once a visit, so the first one names the pack; no other pack draws from
            # this stream.
            random = compression_plan.generator(
                self.seed, pack.visits[0], pack.sample_ids[0], "xi-of-pack"
            )
            # The images of gaps get their shares too, so that those of the other samples stay what
            # they are.
            images = [
                each.missing_tiles if isinstance(each, Gap) else each.tiles_per_image
                for each in samples
            ]
            plan = compression_plan.plan_stratified(
                [count for each in images for count in each], generator=random
            )
            is_gap = np.repeat(
                [isinstance(each, Gap) for each in samples], [sum(each) for each in images]
            )
            return (plan.numpy()[~is_gap],)
        plans = []
        for sample, sample_id, visit in zip(samples, pack.sample_ids, pack.visits, strict=True):
            random = compression_plan.generator(self.seed, visit, sample_id, "xi")
            plan = compression_plan.plan_fraction(
                sample.tiles_per_image, generator=random, sampler=self.xi_sampler
            )
            plans.append(plan.numpy())
        return (np.concatenate(plans),)

    def _router_question(
        self, samples: Sequence[EncodedSample], pack: Pack
    ) -> tuple[np.ndarray, torch.Tensor]:
        """The plan of Eq. 2 over all tiles of the pack, and the local sample of each compressed
        tile."""
        plans = []
        for sample, sample_id, visit in zip(samples, pack.sample_ids, pack.visits, strict=True):
            if STAGES[self.stage].plans != "one_tile" or not sample.num_tiles:
                plans.append(np.zeros(sample.num_tiles, dtype=np.bool_))
                continue
            random = compression_plan.generator(self.seed, visit, sample_id, "router")
            if self.router_granularity == "image":
                plan = compression_plan.plan_one_image(sample.tiles_per_image, generator=random)
            else:
                plan = compression_plan.plan_one_tile(sample.num_tiles, generator=random)
            plans.append(plan.numpy())
        local = np.repeat(np.arange(len(plans)), [int(plan.sum()) for plan in plans])
        return np.concatenate(plans), torch.from_numpy(local)
