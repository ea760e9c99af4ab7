"""Flags of commands that run a model: a checkpoint, its tokenizer, tiling, source of plans."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vico.config.schema import DataOptions

if TYPE_CHECKING:
    from megatron_vico.inference.engine import Engine, PlanSource


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, and how its images are cut into tiles."""
    defaults = DataOptions()
    model = parser.add_argument_group("model")
    load_help = "a run's folder, or a Hugging Face folder in any layout"
    model.add_argument("--load", type=Path, required=True, help=load_help)
    tokenizer_help = "tokenizer folder or .model file; unset, the one in --load"
    model.add_argument("--tokenizer-model", type=Path, help=tokenizer_help)
    tiles, thumbnail = defaults.max_dynamic_patch, defaults.use_thumbnail
    model.add_argument("--max-dynamic-patch", type=int, default=tiles, help="most tiles an image")
    model.add_argument("--use-thumbnail", action=argparse.BooleanOptionalAction, default=thumbnail)


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `add_model_flags`, and how the model answers."""
    add_model_flags(parser)
    answers = parser.add_argument_group("answers")
    answers.add_argument("--bf16", action="store_true", help="compute in bfloat16, not fp32")
    together = "conversations answered together"
    answers.add_argument("--batch-size", type=int, default=16, help=together)
    answers.add_argument("--max-new-tokens", type=int, default=64, help="longest answer")
    tags = DataOptions().tile_tags
    answers.add_argument("--tile-tags", choices=("none", "numbered"), default=tags)
    plan = parser.add_argument_group("compression")
    plan_help = "which tiles get the 16x connector"
    plan.add_argument("--plan", choices=("vir", "none", "all"), default="vir", help=plan_help)
    granularity = ("tile", "image")
    plan.add_argument(
        "--router-granularity", choices=granularity, default="tile", help="as ViR was trained"
    )
    rule_help = (
        "paper: p > 0.5; flash: the released models' quantile and threshold, over one conversation"
    )
    plan.add_argument("--router-rule", choices=("paper", "flash"), default="paper", help=rule_help)
    released = "; unset, the released models'"
    for name, what in (("relative", "quantile"), ("absolute", "least p")):
        help_text = f"{what} of the flash rule{released}"
        plan.add_argument(f"--flash-{name}-threshold", type=float, help=help_text)


@contextmanager
def open_engine(options: argparse.Namespace) -> Iterator["Engine"]:
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

    model = model_of(options.load)
    tokenizer = load_tokenizer(options.tokenizer_model or options.load)
    settings = EncodingSettings.from_options(options, image_size=model.vision.image_size)
    with process_groups.started(ParallelOptions(), seed=0, timeout_minutes=10) as groups:
        engine = build_engine(
            model,
            groups=groups,
            tokenizer=tokenizer,
            settings=settings,
            bf16=options.bf16,
            batch_size=options.batch_size,
        )
        load_weights(engine, options.load)
        yield engine


def plan_source(options: argparse.Namespace) -> "PlanSource":
    """What the engine takes as `plan`, from parsed flags of `add_engine_flags`."""
    from megatron_vico.inference.engine import Routing

    if options.plan == "none" or options.plan == "all":
        return "none" if options.plan == "none" else "all"
    thresholds = {
        name: value
        for name in ("relative_threshold", "absolute_threshold")
        if (value := getattr(options, f"flash_{name}")) is not None
    }
    return Routing(rule=options.router_rule, granularity=options.router_granularity, **thresholds)
