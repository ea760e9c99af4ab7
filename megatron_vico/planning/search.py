"""Layouts of a run on a number of GPUs that fit, best first, by closed forms."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_vico.config.layout import layout_problems, num_microbatches
from megatron_vico.config.registry import ModelConfig
from megatron_vico.config.schema import ParallelOptions, RunConfig
from megatron_vico.errors import ConfigError
from megatron_vico.planning.cards import CARDS, RESERVE
from megatron_vico.planning.closed_forms import Estimate, Machine, estimate

EFFICIENCY = {"dense": 0.45, "experts": 0.3}
"""Of the datasheet's bf16 rate, unless --efficiency says another share."""

SIZES = (1, 2, 4, 8)
STAGES = (1, 2, 4, 6, 8, 12, 16, 24, 32)
CHUNKS = (1, 2, 3, 4, 6)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A layout that works, and what it takes."""

    cfg: RunConfig
    estimate: Estimate

    @property
    def num_bytes(self) -> float:
        return sum(self.estimate.memory.values())


def machine_of(model: ModelConfig, efficiency: float | None) -> Machine:
    """The GPU and the share of its rate that is expected of such a model."""
    kind = "dense" if model.language.num_experts is None else "experts"
    return Machine(efficiency=EFFICIENCY[kind] if efficiency is None else efficiency)


def search(
    cfg: RunConfig, model: ModelConfig, *, world_size: int, gpu: str, machine: Machine
) -> list[Found]:
    """Layouts that fit, the quickest first; of `cfg` all but the layout stays, recompute too.

    Raises:
        ConfigError: if none works, or none fits; names what comes nearest.
    """
    working = [
        Found(cfg=each, estimate=estimate(each, model, world_size=world_size, machine=machine))
        for each in _layouts(cfg, model, world_size)
    ]
    if not working:
        nearest = next(
            ranks
            for off in itertools.count(1)
            for ranks in (world_size - off, world_size + off)
            if ranks > 0 and next(_layouts(cfg, model, ranks), None) is not None
        )
        raise ConfigError(
            f"--world-size {world_size}: no layout of {model.name} works with --global-batch-size"
            f" {cfg.training.global_batch_size}; the nearest that does is {nearest}."
        )
    room = (1 - RESERVE) * CARDS[gpu]
    fitting = [each for each in working if each.num_bytes <= room]
    if not fitting:
        least = min(working, key=lambda each: each.num_bytes)
        raise ConfigError(
            f"--world-size {world_size}: no layout of {model.name} fits on {gpu}; the smallest"
            f" ({described(least.cfg)}) takes {least.num_bytes / 1e9:.1f} GB and {room / 1e9:.1f}"
            f" are there; {_enough(cfg, model, world_size, machine, room)}."
        )
    return sorted(fitting, key=lambda each: each.estimate.expected_s)


def _enough(
    cfg: RunConfig, model: ModelConfig, world_size: int, machine: Machine, room: float
) -> str:
    """The next power of two times as many ranks on which a layout fits."""
    for ranks in (world_size << doubled for doubled in range(1, 8)):
        for each in _layouts(cfg, model, ranks):
            found = estimate(each, model, world_size=ranks, machine=machine)
            if sum(found.memory.values()) <= room:
                return f"{ranks} ranks are enough"
    return f"nor on {world_size << 7} ranks"


def _layouts(cfg: RunConfig, model: ModelConfig, world_size: int) -> Iterator[RunConfig]:
    """The layouts that work."""
    has_experts = model.language.num_experts is not None
    for tensor, stages, context, experts in itertools.product(
        SIZES, STAGES, (1, 2), SIZES if has_experts else (1,)
    ):
        if world_size % (tensor * stages * context):
            continue
        layers, counted = model.language.num_layers, dict[str, Any]()
        for name in (
            "account_for_loss_in_pipeline_split",
            "account_for_embedding_in_pipeline_split",
        ):
            if layers % stages:
                layers, counted[name] = layers + 1, True
        for chunks in CHUNKS:
            if layers % (stages * chunks) or (stages == 1 and chunks > 1):
                continue
            parallel: dict[str, Any] = {
                "tensor_model_parallel_size": tensor,
                "sequence_parallel": tensor > 1,
                "pipeline_model_parallel_size": stages,
                "context_parallel_size": context,
                "expert_model_parallel_size": experts,
                "expert_tensor_parallel_size": 1 if has_experts and tensor > 1 else None,
                "num_layers_per_virtual_pipeline_stage": (
                    layers // stages // chunks if chunks > 1 else None
                ),
            }
            split: dict[str, Any] = dict.fromkeys(_SPLIT) | (counted if stages > 1 else {})
            tried = dataclasses.replace(
                cfg,
                parallel=dataclasses.replace(cfg.parallel, **parallel),
                transformer=dataclasses.replace(cfg.transformer, **split),
            )
            if next(layout_problems(tried, model, world_size), None) is None:
                yield tried


_SPLIT = (
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "pipeline_model_parallel_layout",
    "microbatch_group_size_per_virtual_pipeline_stage",
)


def described(cfg: RunConfig) -> str:
    """`TP2 PP8 VPP4 EP8 ETP1`, leaving out what is 1."""
    parallel: ParallelOptions = cfg.parallel
    chunk = parallel.num_layers_per_virtual_pipeline_stage
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "EP": parallel.expert_model_parallel_size,
    }
    words = [f"{name}{size}" for name, size in sizes.items() if size > 1]
    if parallel.expert_tensor_parallel_size is not None:
        words.append(f"ETP{parallel.expert_tensor_parallel_size}")
    if chunk is not None:
        words.append(f"{chunk} layers a chunk")
    return " ".join(words) or "data-parallel only"


def table(found: list[Found], *, world_size: int) -> list[str]:
    """A line a layout: seconds, then GB by part."""
    parts = list(dict.fromkeys(part for each in found for part in each.estimate.memory))
    lines = [
        f"{'layout':36} {'packs':>5} {'floor s':>8} {'bubble':>7} {'expected s':>10} {'GB':>6}  of"
        f" stage: {', '.join(parts)}"
    ]
    for each in found:
        packs = num_microbatches(each.cfg, world_size)
        memory = " ".join(f"{each.estimate.memory.get(part, 0) / 1e9:.1f}" for part in parts)
        lines.append(
            f"{described(each.cfg):36} {packs:5} {each.estimate.floor_s:8.1f}"
            f" {each.estimate.bubble:7.1%} {each.estimate.expected_s:10.1f}"
            f" {each.num_bytes / 1e9:6.1f}  {each.estimate.stage}: {memory}"
        )
    return lines
