#!/usr/bin/env python3
"""Time of a consistency step over a plain fine-tuning step on the same packs, phase by phase.

    python benchmarks/step.py --json runs/step.json
    torchrun --nproc-per-node 2 benchmarks/step.py --tensor-model-parallel-size 2
    torchrun --nproc-per-node 8 benchmarks/step.py --size internvl3_5-8b --pack-tokens 32768 --bf16
    ...
    python benchmarks/step.py --device cuda

The last is something else: the checks of `make gpu` that take a whole step, four layers of 8B's
width and 1B and 2B whole, with MFU, memory beside the dry run's, FP8 and their goals
(tests/gpu/step_check.py); `--device cpu` runs their small form.

Flags that are not listed by --help are those of `vico train` (layout, --bf16, --attention,
--kl-chunk-rows, ...).

The SFT step is next-token cross-entropy on the uncompressed stream, with the same response rows,
the same chunked head and the same frozen ViT; it trains connector_4x and the language model, the
consistency step connector_16x as well. Both kinds of step run in turns on the same packs in one
run: reading, packing and sending packs to ranks is left out, everything else of the trainer's step
is in. A pack has 75 % visual tokens, four samples of unequal lengths and, of its text, half in
answers.

On the CPU "time" is CPU time, summed over ranks, so that other work on the machine does not count,
and wall time is printed beside it. On a GPU it is the time of the slowest rank's stream; this was
never run on a GPU. The ratio is the median over pairs of steps. Then what the reference pass
allocates: what is left after it must be the response rows.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

# Run as a script, only this folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vico import cpu_stand_in

cpu_stand_in.install()

import torch  # noqa: E402

from benchmarks.runs import benchmark_model, build_run, make_batch, stage_config  # noqa: E402
from megatron_vico.config.flags import parse  # noqa: E402
from megatron_vico.config.layout import (  # noqa: E402
    check_layout,
    data_parallel_size,
    launched_world_size,
)
from megatron_vico.config.registry import ModelConfig  # noqa: E402
from megatron_vico.config.schema import RunConfig  # noqa: E402
from megatron_vico.config.stages import Stage  # noqa: E402
from megatron_vico.parallel.batch import StepBatch  # noqa: E402
from megatron_vico.parallel.groups import Groups, started  # noqa: E402
from megatron_vico.parallel.streams import language_inputs  # noqa: E402
from megatron_vico.training import consistency_step, setup, trainer  # noqa: E402
from megatron_vico.training.reference import Reference  # noqa: E402
from megatron_vico.training.vision import VisualTokens  # noqa: E402
from tests.unit.training.test_reference_memory import PassBytes, pass_bytes  # noqa: E402

PHASES = ("encode", "reference pass", "policy pass", "encoder backward", "optimizer", "other")
"""In the order of a step; `other` is index work on the CPU, zeroing gradients and what stands
between phases."""

KINDS: dict[str, Stage] = {"sft": "pretrain", "vico": "consistency"}
MEMORY_PACKS = (2, 8)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One step."""

    time_s: float
    wall_s: float
    phases_s: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is printed and written; tables have an entry for SFT and one for ViCO."""

    size: str
    device: str
    world_size: int
    num_pairs: int
    packs_per_step: int
    """Over all data-parallel ranks."""

    tokens_per_pack: dict[str, float]
    """Means over the packs of one replica."""

    ratios: list[float]
    """ViCO's time over SFT's in each pair of steps."""

    wall_ratios: list[float]
    time_s: dict[str, float]
    """Medians, as all times here."""

    wall_s: dict[str, float]
    phases_s: dict[str, dict[str, float]]
    reference_bytes: dict[int, PassBytes]
    """By number of packs: the most on any rank."""


@dataclass(kw_only=True)
class Clock:
    """Reads CPU time, or on a GPU marks the stream; adds up phases."""

    on_gpu: bool
    spans: list[tuple[str, Any, Any]] = field(default_factory=list)

    def now(self) -> Any:
        """A mark; waits for nothing."""
        if not self.on_gpu:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds between two marks; waits for the second."""
        if not self.on_gpu:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts as the phase's."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            result = function(*args, **kwargs)
            self.spans.append((phase, start, self.now()))
            return result

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time the functions that are a step's phases; they follow one another and do not nest."""
        places: tuple[tuple[str, Any, str], ...] = (
            ("encode", consistency_step, "tile_features"),
            ("encode", consistency_step, "visual_tokens"),
            ("encode", Reference, "visual_tokens"),
            ("reference pass", Reference, "response_rows"),
            ("policy pass", consistency_step, "training_pass"),
            ("encoder backward", VisualTokens, "backward"),
            ("optimizer", trainer, "update_weights"),
        )
        with ExitStack() as stack:
            for phase, owner, name in places:
                stack.enter_context(
                    mock.patch.object(owner, name, self.timed(phase, getattr(owner, name)))
                )
            yield


def time_step(run: setup.Run, batch: StepBatch) -> Timed:
    """One step of the trainer, called by every rank; times are of all ranks."""
    clock = Clock(on_gpu=run.groups.device.type == "cuda")
    torch.distributed.barrier()
    torch.cuda.synchronize()
    wall = time.perf_counter()
    with clock.watching():
        start = clock.now()
        trainer.compute_gradients(run, batch)
        trainer.update_weights(run)
        end = clock.now()
    torch.cuda.synchronize()
    wall = time.perf_counter() - wall
    total = clock.between(start, end)
    phases = [
        sum(clock.between(a, b) for name, a, b in clock.spans if name == phase)
        for phase in PHASES[:-1]
    ]
    phases.append(total - sum(phases))
    op = torch.distributed.ReduceOp
    figures = torch.tensor([total, *phases], dtype=torch.float64, device=run.groups.device)
    torch.distributed.all_reduce(figures, op=op.MAX if clock.on_gpu else op.SUM)
    walls = torch.tensor(wall, dtype=torch.float64, device=run.groups.device)
    torch.distributed.all_reduce(walls, op=op.MAX)
    time_s, *phases_s = figures.tolist()
    return Timed(
        time_s=time_s, wall_s=float(walls), phases_s=dict(zip(PHASES, phases_s, strict=True))
    )


def reference_bytes(run: setup.Run, *, num_packs: int, pack_tokens: int) -> PassBytes:
    """The most that a reference pass over some packs allocates on any rank; every rank calls it."""
    assert run.reference is not None
    batch = make_batch(
        run.cfg,
        model=run.model,
        stage="consistency",
        step=0,
        num_packs=num_packs,
        pack_tokens=pack_tokens,
        groups=run.groups,
    )
    device = run.groups.device
    inputs = [
        language_inputs(pack.reference, run.policy.stream_cut, device) for pack in batch.packs
    ]
    with torch.no_grad():
        features = consistency_step.tile_features(
            run.policy.encoder, batch, device, chunk_tiles=run.policy.chunk_tiles
        )
    tokens = run.reference.visual_tokens(batch, features, inputs=inputs, groups=run.groups)
    reference = run.reference
    own = pass_bytes(lambda: reference.response_rows(inputs, tokens, groups=run.groups), device)
    largest = torch.tensor([own.rows, own.kept, own.peak], device=device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    rows, kept, peak = largest.tolist()
    return PassBytes(rows=rows, kept=kept, peak=peak)


def measure(
    options: argparse.Namespace, cfg: RunConfig, model: ModelConfig, groups: Groups
) -> Measured:
    """Both kinds of step in turns, then the reference's memory; called by every rank."""
    runs = {
        kind: build_run(stage_config(cfg, stage), model, groups) for kind, stage in KINDS.items()
    }
    steps: dict[str, list[Timed]] = {kind: [] for kind in KINDS}
    tokens: Counter[str] = Counter()
    for step in range(options.warmup + options.steps):
        for kind, stage in KINDS.items():
            batch = make_batch(
                cfg,
                model=model,
                stage=stage,
                step=step,
                num_packs=options.num_packs,
                pack_tokens=options.pack_tokens,
                groups=groups,
            )
            timed = time_step(runs[kind], batch)
            if step < options.warmup:
                continue
            steps[kind].append(timed)
            for pack in batch.packs if kind == "vico" else ():
                tokens["reference"] += len(pack.reference.token_ids)
                tokens["policy"] += len(pack.policies[0].token_ids)
                tokens["response rows"] += len(pack.labels)
    return Measured(
        size=model.name,
        device=groups.device.type,
        world_size=torch.distributed.get_world_size(),
        num_pairs=options.steps,
        packs_per_step=cfg.training.global_batch_size,
        tokens_per_pack={
            name: count / (options.steps * options.num_packs) for name, count in tokens.items()
        },
        ratios=[
            vico.time_s / sft.time_s for sft, vico in zip(steps["sft"], steps["vico"], strict=True)
        ],
        wall_ratios=[
            vico.wall_s / sft.wall_s for sft, vico in zip(steps["sft"], steps["vico"], strict=True)
        ],
        time_s={
            kind: statistics.median(each.time_s for each in timed) for kind, timed in steps.items()
        },
        wall_s={
            kind: statistics.median(each.wall_s for each in timed) for kind, timed in steps.items()
        },
        phases_s={
            kind: {
                phase: statistics.median(each.phases_s[phase] for each in timed) for phase in PHASES
            }
            for kind, timed in steps.items()
        },
        reference_bytes={
            number: reference_bytes(runs["vico"], num_packs=number, pack_tokens=options.pack_tokens)
            for number in MEMORY_PACKS
        },
    )


def print_table(found: Measured) -> None:
    """One line a phase, then the ratio and the memory."""
    tokens = ", ".join(f"{count:.0f} {name}" for name, count in found.tokens_per_pack.items())
    kind = (
        "of the slowest rank's stream" if found.device == "cuda" else "of the CPU, over all ranks"
    )
    print(
        f"{found.size} on {found.world_size} {found.device} ranks; {found.packs_per_step} packs a"
        f" step of {tokens} each"
    )
    print(f"time {kind}; medians of {found.num_pairs} pairs of steps")
    print(f"{'phase':17} {'SFT':>10} {'ViCO':>10}")
    for phase in PHASES:
        sft, vico = (found.phases_s[kind][phase] * 1e3 for kind in KINDS)
        print(f"{phase:17} {sft:7.1f} ms {vico:7.1f} ms")
    for name, times, ratios in (
        ("step", found.time_s, found.ratios),
        ("step, wall time", found.wall_s, found.wall_ratios),
    ):
        line = f"{name:17} {times['sft'] * 1e3:7.1f} ms {times['vico'] * 1e3:7.1f} ms"
        print(
            f"{line}   ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to"
            f" {max(ratios):.3f})"
        )
    for number, each in found.reference_bytes.items():
        print(
            f"reference pass over {number} packs: rows of {each.rows:,} bytes; beyond them"
            f" {each.kept - each.rows:,} bytes are kept; the peak beyond them is"
            f" {each.peak - each.rows:,} bytes"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a table, write JSON."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--size", default="benchmark", help="a model size of the registry, or this benchmark's own"
    )
    parser.add_argument("--pack-tokens", type=int, default=2048, help="reference tokens of a pack")
    parser.add_argument(
        "--num-packs", type=int, default=4, help="packs of a step and data-parallel rank"
    )
    parser.add_argument("--steps", type=int, default=9, help="pairs of steps to take the median of")
    parser.add_argument("--warmup", type=int, default=1, help="pairs before them")
    parser.add_argument("--json", type=Path, help="JSON file to write")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="run the checks of `make gpu` of a step there"
    )
    options, rest = parser.parse_known_args(arguments)
    if options.device is not None:
        from tests.gpu.__main__ import main as run_checks
        from tests.gpu.one import STEP_CHECKS

        if (options.device == "cuda") != torch.cuda.is_available():
            found = (
                "no GPU" if options.device == "cuda" else "a GPU (CUDA_VISIBLE_DEVICES= hides it)"
            )
            parser.error(f"--device {options.device}, but torch finds {found}")
        journal = [] if options.json is None else ["--journal", str(options.json)]
        return run_checks([*STEP_CHECKS, *journal, *rest])
    model, cfg, world_size = benchmark_model(options.size), parse(rest), launched_world_size()
    packs = options.num_packs * data_parallel_size(cfg.parallel, world_size)
    iters = options.warmup + options.steps
    cfg = dataclasses.replace(
        cfg, training=dataclasses.replace(cfg.training, global_batch_size=packs, train_iters=iters)
    )
    check_layout(cfg, model=model, world_size=world_size)
    with started(cfg.parallel, seed=cfg.training.seed, timeout_minutes=10) as groups:
        found = measure(options, cfg, model, groups)
        if groups.is_main:
            print_table(found)
        if groups.is_main and options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(dataclasses.asdict(found), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
