"""Flags of commands that run a model: a checkpoint, its tokenizer, tiling, source of plans."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from megatron_vico.cli.command_line import refuse_less
from megatron_vico.config.schema import TilingOptions, flag_of
from megatron_vico.errors import ConfigError

if TYPE_CHECKING:
    from megatron_vico.config.registry import ModelConfig
    from megatron_vico.convert.huggingface.config import ExportOptions
    from megatron_vico.inference.engine import Engine
    from megatron_vico.inference.plans import PlanSource, Replay, Routing

Overrides = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """Which checkpoint, and how its images are cut into tiles: unset, as the checkpoint says."""

    load: Path
    """A run's folder, or a Hugging Face folder in any layout."""

    tokenizer_model: Path | None = None
    """Tokenizer folder or .model file; unset, the one in --load."""

    max_dynamic_patch: int | None = None
    """Most tiles of one image, thumbnail not counted; unset, what --load says."""

    use_thumbnail: bool | None = None
    """Append the whole image as one more tile when it was cut into several; unset, what --load
    says."""

    tile_tags: Literal["none", "numbered"] | None = None
    """Text before each tile; unset, what --load says."""

    bf16: bool = False
    """Compute in bfloat16, not fp32."""

    batch_size: int = 16
    """Conversations answered together."""

    # What the checkpoint says -> the flag that says otherwise.
    _overriding: ClassVar[Overrides] = {
        name: name for name in ("max_dynamic_patch", "use_thumbnail", "tile_tags")
    }

    _counts: ClassVar[tuple[str, ...]] = ("max_dynamic_patch", "batch_size")

    def __post_init__(self) -> None:
        """Raises: ConfigError: if a count admits nothing."""
        refuse_less(self, **dict.fromkeys(self._counts, 1))

    @cached_property
    def use(self) -> "ExportOptions":
        """What --load says of its use, changed by the flags, each of which is told.

        Raises:
            CheckpointError: if it says something that cannot be followed here.
            ConfigError: if a flag is out of range.
        """
        from megatron_vico.convert.huggingface.config import check_said
        from megatron_vico.convert.stated import stated_options
        from megatron_vico.errors import CheckpointError

        said = stated_options(self.load, unsaid_rule="paper")
        if said.template != "internvl2_5":
            raise CheckpointError(
                f"{self.load}: template is {said.template!r}, but prompts are made by 'internvl2_5'"
                " only; such a model needs its own code."
            )
        changed = {}
        for name, flag in self._overriding.items():
            given, stated = getattr(self, flag), getattr(said, name)
            if given is not None and given != stated:
                print(
                    f"note: {flag_of(flag)} {given}, not {stated} as {self.load} says.",
                    file=sys.stderr,
                )
                changed[name] = given
        check_said(changed, path="command line")
        return replace(said, **changed)

    @cached_property
    def model(self) -> "ModelConfig":
        """That of --load; CheckpointError if it is none."""
        from megatron_vico.inference.loading import model_of

        return model_of(self.load)

    @contextmanager
    def engine(self) -> Iterator["Engine"]:
        """An engine with the weights of --load; its process groups end with the context.

        The ranks of a launcher share each layer; only the first prints.

        Raises:
            CheckpointError: if --load is no checkpoint.
            ConfigError: if there is no tokenizer, or the model is not to be shared by so many.
        """
        from megatron_vico.config.layout import launched_world_size
        from megatron_vico.config.schema import ParallelOptions
        from megatron_vico.convert.open import TOKENIZER_FOLDER, is_megatron
        from megatron_vico.data.encode.sample_encoder import EncodingSettings
        from megatron_vico.data.encode.tokenizer import load_tokenizer
        from megatron_vico.inference.loading import build_engine, load_weights
        from megatron_vico.parallel import groups as process_groups

        model, use = self.model, self.use
        beside = self.load / TOKENIZER_FOLDER if is_megatron(self.load) else self.load
        tokenizer = load_tokenizer(self.tokenizer_model or beside)
        tokenizer.check_fits(model)
        tiling = TilingOptions(
            max_dynamic_patch=use.max_dynamic_patch,
            use_thumbnail=use.use_thumbnail,
            tile_tags=use.tile_tags,
        )
        settings = EncodingSettings.from_options(tiling, image_size=model.vision.image_size)
        num_ranks, num_groups = launched_world_size(), model.language.num_query_groups
        if num_groups % num_ranks:
            raise ConfigError(
                f"{num_ranks} ranks do not divide num_query_groups {num_groups} of {model.name};"
                " start a number that does."
            )
        parallel = ParallelOptions(tensor_model_parallel_size=num_ranks)
        with process_groups.started(parallel, seed=0, timeout_minutes=10) as groups:
            engine = build_engine(
                model,
                groups=groups,
                tokenizer=tokenizer,
                settings=settings,
                bf16=self.bf16,
                batch_size=self.batch_size,
                stop_ids=use.stop_ids,
            )
            load_weights(engine, self.load)
            yield engine


@dataclass(frozen=True, kw_only=True)
class RoutingFlags(ModelFlags):
    """How the router's scores become a plan: unset, as the checkpoint says."""

    router_granularity: Literal["tile", "image"] | None = None
    """What ViR decides on; unset, what --load says."""

    router_rule: Literal["paper", "flash"] | None = None
    """paper: p > 0.5; flash: the released models' quantile and threshold, over one conversation.
    Unset, what an export says; paper for a run's folder."""

    flash_relative_threshold: float | None = None
    """Quantile of the flash rule; unset, what --load says."""

    flash_absolute_threshold: float | None = None
    """Least p of the flash rule; unset, what --load says."""

    _overriding: ClassVar[Overrides] = ModelFlags._overriding | {
        "router_granularity": "router_granularity",
        "flash_decision_rule": "router_rule",
        "flash_relative_threshold": "flash_relative_threshold",
        "flash_absolute_threshold": "flash_absolute_threshold",
    }

    @cached_property
    def drawn(self) -> list[str]:
        """Of ViR and the 16x connector what --load lacks or never trained: it would be drawn."""
        from megatron_vico.convert.stated import untrained_modules

        return [name for name in untrained_modules(self.load) if name in ("connector_16x", "vir")]

    def lacks(self, missing: Sequence[str]) -> str:
        """A clause for messages."""
        return f"{self.load} has no trained {' and no trained '.join(missing)}"

    def routing(self) -> "Routing":
        """The router's rule; ConfigError if there is no trained router to ask."""
        from megatron_vico.inference.plans import Routing

        if self.drawn:
            raise ConfigError(
                f"{self.lacks(self.drawn)}, so that no tile can be routed; give a checkpoint of the"
                " router stage."
            )
        return Routing(
            rule=self.use.flash_decision_rule,
            granularity=self.use.router_granularity,
            relative_threshold=self.use.flash_relative_threshold,
            absolute_threshold=self.use.flash_absolute_threshold,
        )


@dataclass(frozen=True, kw_only=True)
class PlanFlags(RoutingFlags):
    """Where compression plans come from."""

    replay: Path | None = None
    """JSONL file of decisions that the plan `replay` takes: a request log of `vico serve`, or what
    `vico evaluate --write-plans` wrote."""

    @cached_property
    def _decided(self) -> "Replay | None":
        from megatron_vico.inference.plans import read_replay

        return None if self.replay is None else read_replay(self.replay)

    def read_plan(self, name: str) -> "PlanSource":
        """The plan of a name; ConfigError if it needs what was never trained, or there is none."""
        from megatron_vico.inference import plans

        kind = name.partition("=")[0]
        uncompressed = ("none", "vir", "image", "fastv", "sparsevlm")
        if kind not in uncompressed and "connector_16x" in self.drawn:
            raise ConfigError(f"plan {name}: {self.lacks(['connector_16x'])}; take the plan none.")
        routing = self.routing() if kind in ("vir", "image") else None
        num_layers = self.model.language.num_layers if kind in plans.PUBLISHED else 0
        return plans.read_plan(name, routing=routing, replay=self._decided, num_layers=num_layers)


@dataclass(frozen=True, kw_only=True)
class AnswerFlags(PlanFlags):
    """How the model answers, and from how many visual tokens."""

    max_new_tokens: int = 64
    """Longest answer."""

    plan: str | None = None
    """Which tiles get the 16x connector: none, all, vir (the router), image (the router, image by
    image), random=R (a share R of them) or replay; fastv and sparsevlm compress none, but drop
    visual tokens between layers, fastv=S a share S of them in the mean over layers. Unset, vir
    where --load has a trained router, else none."""

    _counts: ClassVar[tuple[str, ...]] = (*PlanFlags._counts, "max_new_tokens")

    @cached_property
    def chosen_plan(self) -> str:
        """--plan, or what the checkpoint can do."""
        if self.plan is None and self.drawn:
            print(f"note: {self.lacks(self.drawn)}: nothing is compressed.", file=sys.stderr)
            return "none"
        return self.plan or "vir"

    def plan_source(self) -> "PlanSource":
        """What the engine takes as `plan`; ConfigError as in `read_plan`."""
        return self.read_plan(self.chosen_plan)
