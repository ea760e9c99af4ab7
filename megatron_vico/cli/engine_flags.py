"""Flags of commands that run a model: a checkpoint, its tokenizer, tiling, source of plans."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_vico.config.schema import TilingOptions

if TYPE_CHECKING:
    from megatron_vico.inference.engine import Engine, PlanSource


@dataclass(frozen=True, kw_only=True)
class ModelFlags(TilingOptions):
    """Which checkpoint, and how its images are cut into tiles."""

    load: Path
    """A run's folder, or a Hugging Face folder in any layout."""

    tokenizer_model: Path | None = None
    """Tokenizer folder or .model file; unset, the one in --load."""

    bf16: bool = False
    """Compute in bfloat16, not fp32."""

    batch_size: int = 16
    """Conversations answered together."""

    @contextmanager
    def engine(self) -> Iterator["Engine"]:
        """An engine with the weights of --load; its process groups end with the context.

        Raises:
            CheckpointError: if --load is no checkpoint.
            ConfigError: if there is no tokenizer.
        """
        from megatron_vico.config.schema import ParallelOptions
        from megatron_vico.data.encode.sample_encoder import EncodingSettings
        from megatron_vico.data.encode.tokenizer import load_tokenizer
        from megatron_vico.inference.loading import build_engine, load_weights, model_of
        from megatron_vico.parallel import groups as process_groups

        model = model_of(self.load)
        tokenizer = load_tokenizer(self.tokenizer_model or self.load)
        settings = EncodingSettings.from_options(self, image_size=model.vision.image_size)
        with process_groups.started(ParallelOptions(), seed=0, timeout_minutes=10) as groups:
            engine = build_engine(
                model,
                groups=groups,
                tokenizer=tokenizer,
                settings=settings,
                bf16=self.bf16,
                batch_size=self.batch_size,
            )
            load_weights(engine, self.load)
            yield engine


@dataclass(frozen=True, kw_only=True)
class AnswerFlags(ModelFlags):
    """How the model answers, and from how many visual tokens."""

    max_new_tokens: int = 64
    """Longest answer."""

    plan: Literal["vir", "none", "all"] = "vir"
    """Which tiles get the 16x connector."""

    router_granularity: Literal["tile", "image"] = "tile"
    """As ViR was trained."""

    router_rule: Literal["paper", "flash"] = "paper"
    """paper: p > 0.5; flash: the released models' quantile and threshold, over one conversation."""

    flash_relative_threshold: float | None = None
    """Quantile of the flash rule; unset, the released models'."""

    flash_absolute_threshold: float | None = None
    """Least p of the flash rule; unset, the released models'."""

    def plan_source(self) -> "PlanSource":
        """What the engine takes as `plan`."""
        from megatron_vico.inference.engine import Routing

        if self.plan != "vir":
            return self.plan
        thresholds = {
            name: value
            for name in ("relative_threshold", "absolute_threshold")
            if (value := getattr(self, f"flash_{name}")) is not None
        }
        return Routing(rule=self.router_rule, granularity=self.router_granularity, **thresholds)
