"""What every kind of rank of a run takes of a card, for a whole step: dry runs, put together.

Each rank is played in a process of its own. A step of few packs is quick; what each further pack
adds is measured between two steps, and a whole one worked out.
"""

import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vico.config.layout import num_microbatches, virtual_stages
from megatron_vico.config.registry import ModelConfig
from megatron_vico.config.schema import RunConfig
from megatron_vico.config.validate import validate
from megatron_vico.errors import ConfigError
from megatron_vico.planning.cards import CARDS, RESERVE
from megatron_vico.planning.dry_run import dry_run
from megatron_vico.planning.meter import Call, Counted

PROCESSES = min(3, os.cpu_count() or 1)
"""At a time, of 1 to 2 GB each."""


@dataclass(frozen=True, kw_only=True)
class Traffic(Call):
    """How often, and of how many bytes, in a step."""

    calls: float
    num_bytes: float


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """What a step takes of one rank; bytes, FLOPs and counts."""

    rank: int
    stage: int
    packs: int
    """Packs of a replica in a whole step."""

    measured_packs: tuple[int, ...]
    """Packs of the steps that were run; what a whole step takes follows if it is none of them."""

    static: dict[str, int]
    """Bytes by part between two steps."""

    peak_bytes: int
    peak_phase: str
    peak: dict[str, int]
    """Bytes by part at the highest moment."""

    peaks: dict[str, int]
    """Highest bytes in each phase."""

    bytes_per_pack: float
    """What a further pack adds to the peak; 0 where no second step was needed."""

    tensors: tuple[tuple[str, int, int], ...]
    """The largest at the peak of `peak_phase` in the last step that was run, without weights,
    gradients and optimizer: what and where, bytes, number."""

    flops: dict[str, float]
    traffic: tuple[Traffic, ...]
    waits: dict[str, float]


def ranks_that_differ(cfg: RunConfig, world_size: int) -> dict[str, int]:
    """The first rank of the first, a middle and the last pipeline stage.

    Of the middle ones it is the second, which has the most packs under way.
    """
    stages = cfg.parallel.pipeline_model_parallel_size
    of_a_stage = world_size // stages
    ranks = {"first": 0}
    if stages > 2:
        ranks["middle"] = of_a_stage
    if stages > 1:
        ranks["last"] = (stages - 1) * of_a_stage
    return ranks


def steps_to_run(
    cfg: RunConfig, model: ModelConfig, *, world_size: int, packs: int | None
) -> tuple[int, ...]:
    """Numbers of packs of the steps to run: the whole one, or two smaller ones.

    `packs` are of the smaller one; None, the whole step is run; 0, as few as fill the pipeline.
    ConfigError if they do not fill it, so that a further pack would add more than its own.
    """
    whole = num_microbatches(cfg, world_size)
    if packs is None or packs >= whole:
        return (whole,)
    stages, unit = cfg.parallel.pipeline_model_parallel_size, _packs_in_turn(cfg, model)
    chunks = virtual_stages(cfg, model.language) or 1
    # The first stage has 2 (stages - 1) + (chunks - 1) unit chunks under way, and then one more.
    under_way = 2 * (stages - 1) + (chunks - 1) * unit + 1 if chunks > 1 else stages
    least = -(-under_way // (chunks * unit)) * unit
    packs = packs or least
    if packs < least:
        raise ConfigError(
            f"--packs {packs} does not fill a pipeline of {stages} stages"
            f"{f' x {chunks} chunks' if chunks > 1 else ''}; use {least} or more of {whole}."
        )
    packs = packs // unit * unit
    return (packs, packs + unit) if packs + unit < whole else (whole,)


def _packs_in_turn(cfg: RunConfig, model: ModelConfig) -> int:
    """What the number of packs is a multiple of: an interleaved schedule takes them in groups."""
    if virtual_stages(cfg, model.language) is None:
        return 1
    group = cfg.transformer.microbatch_group_size_per_virtual_pipeline_stage
    return group or cfg.parallel.pipeline_model_parallel_size


def plan_ranks(
    cfg: RunConfig,
    model: ModelConfig,
    *,
    world_size: int,
    ranks: Sequence[int],
    packs: int | None = None,
) -> list[RankPlan]:
    """Play some ranks of a run, each in a process of its own; `packs` as for `steps_to_run`."""
    steps = (
        _packs_in_turn(cfg, model),
        *steps_to_run(cfg, model, world_size=world_size, packs=packs),
    )
    jobs = [(cfg, model, world_size, rank, steps) for rank in ranks]
    processes = min(PROCESSES, len(jobs))
    with multiprocessing.get_context("fork").Pool(processes, maxtasksperchild=1) as pool:
        return pool.map(_play, jobs, chunksize=1)


def nearest_that_fits(
    cfg: RunConfig, model: ModelConfig, worst: RankPlan, *, world_size: int, gpu: str
) -> str:
    """Flags that a run which does not fit would fit with: another card, or more ranks.

    With more ranks than `worst`, the one that takes most, was played with, the optimizer's state is
    shared by more, which a dry run without a step shows, and a step takes the same.
    """
    found = []
    for name, size in CARDS.items():
        if size > CARDS[gpu] and worst.peak_bytes <= (1 - RESERVE) * size:
            found.append(f"--gpu {name}")
    for factor in (2, 4, 8):
        try:
            validate(cfg, world_size * factor, model=model)
        except ConfigError:  # the batch has too few packs, or a pipeline that they do not fill
            break
        job = {"world_size": world_size * factor, "rank": worst.rank * factor, "num_packs": ()}
        with multiprocessing.get_context("fork").Pool(1) as pool:
            static = sum(pool.apply(dry_run, (cfg, model), job).static.values())
        peak = worst.peak_bytes - sum(worst.static.values()) + static
        if peak <= (1 - RESERVE) * CARDS[gpu]:
            found.append(f"--world-size {world_size * factor} (about {peak / 1e9:.0f} GB)")
            break
    return " or ".join(found)


def _play(job: tuple[RunConfig, ModelConfig, int, int, tuple[int, ...]]) -> RankPlan:
    cfg, model, world_size, rank, steps = job
    found = dry_run(cfg, model, world_size=world_size, rank=rank, num_packs=steps)
    whole = num_microbatches(cfg, world_size)
    stages = cfg.parallel.pipeline_model_parallel_size
    return whole_step(
        found.steps, found.static, rank=rank, stage=rank // (world_size // stages), packs=whole
    )


def whole_step(
    steps: dict[int, Counted], static: dict[str, int], *, rank: int, stage: int, packs: int
) -> RankPlan:
    """A whole step from the ones that were run: everything grows evenly, pack by pack."""
    few, many = min(steps), max(steps)
    first, last = steps[few], steps[many]
    further = (packs - many) / (many - few) if many > few else 0.0

    def grown(before: float, after: float) -> float:
        return after + further * (after - before)

    def each(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
        return {key: grown(before.get(key, 0), value) for key, value in after.items()}

    peaks = each(first.peak, last.peak)
    highest = max(peaks, key=peaks.__getitem__)
    parts = each(first.parts.get(highest, {}), last.parts[highest])
    tensors = sorted(last.tensors.get(highest, {}).items(), key=lambda item: -item[1][0])[:12]
    none = (0, 0)
    traffic = (
        Traffic(
            **vars(call),
            calls=grown(first.calls.get(call, none)[0], number),
            num_bytes=grown(first.calls.get(call, none)[1], size),
        )
        for call, (number, size) in last.calls.items()
    )
    return RankPlan(
        rank=rank,
        stage=stage,
        packs=packs,
        measured_packs=tuple(steps),
        static=static,
        peak_bytes=round(peaks[highest]),
        peak_phase=highest,
        peak={part: round(size) for part, size in parts.items() if size},
        peaks={name: round(size) for name, size in peaks.items()},
        bytes_per_pack=(last.peak[highest] - first.peak[highest]) / max(many - few, 1),
        tensors=tuple((text, size, number) for text, (size, number) in tensors),
        flops=each(first.flops, last.flops),
        traffic=tuple(sorted(traffic, key=lambda each: -each.num_bytes)),
        waits=each(first.waits, last.waits),
    )
