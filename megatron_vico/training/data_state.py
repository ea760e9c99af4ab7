"""What every rank knows of a run's data: its place in the order, and the broken samples."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_vico.checkpoint.ranks import Ranks
from megatron_vico.config.layout import replicas_in_step
from megatron_vico.config.pipeline_split import virtual_stages
from megatron_vico.config.registry import ModelConfig
from megatron_vico.config.schema import RunConfig
from megatron_vico.data.encode.sample_encoder import EncodingSettings, SampleEncoder
from megatron_vico.data.encode.tokenizer import load_tokenizer
from megatron_vico.data.load.error_budget import ErrorBudget, SkipList
from megatron_vico.data.load.loader import Loader, open_plan
from megatron_vico.data.pack.balance import Sharing
from megatron_vico.data.pack.builder import PackBuilder
from megatron_vico.data.pack.plan_state import PlanState
from megatron_vico.errors import ConfigError
from megatron_vico.parallel.groups import Groups
from megatron_vico.training.flops import pack_cost
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

    def go_on(self, place: tuple[PlanState, SkipList] | None) -> None:
        """Go to a place; broken samples that were found since it was noted stay known."""
        if self.loader is not None and place is not None:
            self.loader.plan_state, skips = place
            for each in skips:
                self.loader.skips.add(each)

    def count(self, figures: StepFigures) -> None:
        """Count a step, on every rank; SampleError, on all, if too many samples are broken."""
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
        readers = [each for each in Ranks.of_run().gather(own) if each is not None]
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


def refuse_useless_data(cfg: RunConfig, data: DataState) -> None:
    """ConfigError, on a rank that reads, if nothing could be learned or samples come twice."""
    if data.loader is None:
        return
    plan = data.loader.plan
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


def build_loader(
    cfg: RunConfig,
    model: ModelConfig,
    groups: Groups,
    *,
    num_steps: int | None = None,
    state: dict[str, Any] | None = None,
    views: Literal["training", "validation"] = "training",
) -> Loader:
    """The loader of a replica's packs, for its first rank; `views` as in `PackBuilder`."""
    assert cfg.data.tokenizer_model is not None, "config/validate.py asks for it"
    tokenizer = load_tokenizer(cfg.data.tokenizer_model)
    tokenizer.check_fits(model)
    settings = EncodingSettings.from_options(cfg.data, image_size=model.vision.image_size)
    builder = PackBuilder(
        stage=cfg.stage.stage,
        seed=cfg.training.seed,
        tokens_kept=model.visual_tokens_per_tile,
        tokens_compressed=model.compressed_tokens_per_tile,
        image_token_id=model.image_token_id,
        xi_sampler=cfg.stage.xi_sampler,
        router_granularity=cfg.stage.router_granularity,
        views=views,
        cost=pack_cost(model, cfg.stage),
    )
    plan = open_plan(cfg.data, builder=builder, global_batch_size=cfg.training.global_batch_size)
    return Loader(
        plan,
        encoder=SampleEncoder(tokenizer=tokenizer, settings=settings),
        builder=builder,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        sharing=_sharing(cfg, model),
        num_steps=num_steps,
        state=state,
    )


def _sharing(cfg: RunConfig, model: ModelConfig) -> Sharing:
    """How replicas must share packs.

    Within a pass nothing goes over replicas but tokens to experts, and what is balanced over all
    tokens. Gradients are reduced once, in or after a replica's last microbatch.
    """
    # The interleaved schedule runs whole groups of microbatches, as many on every replica.
    equal = (
        virtual_stages(cfg, model.language) is not None
        or cfg.transformer.moe_router_load_balancing_type == "global_aux_loss"
    )
    return Sharing(
        in_step=replicas_in_step(cfg.parallel, model), counts="equal" if equal else "any"
    )
