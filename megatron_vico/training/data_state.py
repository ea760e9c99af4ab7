"""What every rank knows of a run's data: its place in the order, and the broken samples."""

from dataclasses import dataclass
from typing import Any

import torch

from megatron_vico.config.schema import RunConfig
from megatron_vico.data.load.error_budget import ErrorBudget, SkipList
from megatron_vico.data.load.loader import Loader
from megatron_vico.data.pack.plan import PackPlan
from megatron_vico.data.pack.plan_state import PlanState
from megatron_vico.errors import ConfigError
from megatron_vico.training.metrics import StepFigures


@dataclass(frozen=True, kw_only=True)
class DataState:
    """A replica's reader, on its first rank, and the error budget, the same on all ranks."""

    loader: Loader | None
    budget: ErrorBudget

    @classmethod
    def of(
        cls, loader: Loader | None, *, max_skipped_share: float, restored: dict[str, Any] | None
    ) -> "DataState":
        """`restored` is what `to_state` gave at the checkpoint resumed from; None for a new run."""
        budget = ErrorBudget(max_share=max_skipped_share)
        if restored is not None:
            budget.seen, budget.skipped = restored["seen"], len(restored["skipped"])
        return cls(loader=loader, budget=budget)

    def place(self) -> tuple[PlanState, SkipList] | None:
        """Where the reader is, to `go_back` to; None where this rank does not read."""
        loader = self.loader
        return None if loader is None else (loader.plan_state, SkipList(loader.skips))

    def go_back(self, place: tuple[PlanState, SkipList] | None) -> None:
        """Take back a batch that was read but is not used."""
        if self.loader is not None and place is not None:
            self.loader.plan_state, self.loader.skips = place

    def count(self, figures: StepFigures) -> None:
        """Count a step; called by every rank.

        Raises:
            SampleError: on every rank, if more samples are broken than the budget allows.
        """
        # The figures are those of all ranks: all decide the same without asking each other.
        self.budget.seen += figures.samples
        self.budget.skipped += figures.skipped
        if self.budget.exceeded:
            merged = self._merge().skips
            # Fewer may be left: a sample that two ranks met counts once.
            if self.budget.exceeded:
                raise self.budget.error(merged)

    def to_state(self) -> dict[str, Any]:
        """For a checkpoint, the same on every rank: numbers and strings; called by every rank."""
        reader = self._merge()
        return {"plan": reader.plan, "skipped": reader.skips.to_state(), "seen": self.budget.seen}

    def _merge(self) -> "_Reader":
        """Ask all readers, and let each know what the others found."""
        own = None
        if (loader := self.loader) is not None:
            plan = loader.plan_state.to_dict()
            own = _Reader(plan=plan, skips=loader.skips, begun=loader.begun_packs)
        gathered: list[_Reader | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, own)
        readers = [each for each in gathered if each is not None]
        begun = max(each.begun for each in readers)
        merged = SkipList.merged([each.skips for each in readers], from_pack=begun)
        self.budget.skipped = len(merged)
        if loader is not None:
            loader.skips = merged
        return _Reader(plan=readers[0].plan, skips=merged, begun=begun)


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """What a loader tells the other ranks."""

    plan: dict[str, Any]
    """Its place; the same for all."""

    skips: SkipList
    begun: int
    """Packs of the run that its workers have begun."""


def refuse_useless_data(cfg: RunConfig, plan: PackPlan) -> None:
    """ConfigError if nothing could be learned, or a step would have samples twice."""
    paths = ", ".join(str(folder.path) for folder in plan.data.folders)
    learns_from_text = "language_model" in cfg.stage.trained and cfg.stage.spec.plans == "none"
    if not plan.num_tiles.any() and not learns_from_text:
        raise ConfigError(
            f"--data-path: no sample of {paths} has an image, so that stage {cfg.stage.stage!r},"
            f" which trains {', '.join(cfg.stage.trained)}, would learn nothing; give data with"
            " images."
        )
    in_step = next(plan.steps()).num_samples
    if in_step > plan.samples_per_epoch:
        packs = sum(1 for _ in plan.epoch(0))
        raise ConfigError(
            f"--global-batch-size {cfg.training.global_batch_size}: a step has {in_step} samples,"
            f" but an epoch of {paths} has {plan.samples_per_epoch:g} (in {packs} packs), so that"
            f" samples would come more than once in a step; use at most {packs}, or more data."
        )
