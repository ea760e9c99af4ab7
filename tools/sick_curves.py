#!/usr/bin/env python3
"""Draws healthy curves beside sick ones, for docs/figures.md: the demo's runs and what spoils them.

Run, after `make demo` (10 minutes on an idle core):

    python tools/sick_curves.py --demo runs/demo --work runs/curves --output docs/images

Sick runs start from the demo's checkpoints with its recipes; each is one training command, which is
shown and can be run by itself. What is in --work is not run again.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_vico.evaluation.plots import read_metrics

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "examples" / "quickstart" / "recipes"
STEPS, SMOOTHED, NUM_SHUFFLED = 160, 10, 3000
TILING = ("--max-dynamic-patch", "4", "--no-use-thumbnail", "--tile-tags", "numbered")
SHARES = ("0", "25", "50", "75", "100")


@dataclass(frozen=True, kw_only=True)
class Sick:
    """A run that differs from the demo's in one thing."""

    recipe: str
    start: str
    flags: tuple[str, ...] = ()
    shards: str = "demo"


RUNS = {
    "right answers": Sick(recipe="pretrain", start="pretrain", flags=("--lr", "1e-3")),
    "shuffled answers": Sick(
        recipe="pretrain", start="pretrain", flags=("--lr", "1e-3"), shards="shuffled"
    ),
    "rate 30 times as high": Sick(
        recipe="consistency", start="warmup", flags=("--lr", "3e-2", "--bad-step-factor", "0")
    ),
    "no warm-up stage": Sick(recipe="consistency", start="pretrain"),
    "window of one step": Sick(
        recipe="router", start="consistency", flags=("--router-window", "32")
    ),
    "router: rate 30 times as high": Sick(
        recipe="router", start="consistency", flags=("--lr", "3e-2")
    ),
}


def main() -> int:
    """Train what is not there yet, then draw; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--demo", type=Path, default=ROOT / "runs" / "demo", help="made by the demo"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "curves", help="for sick runs")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures")
    given = parser.parse_args()
    demo, work = given.demo.resolve(), given.work.resolve()
    shuffle_answers(demo, work)
    for name, sick in RUNS.items():
        run = work / folder_of(name)
        if not (run / "latest_checkpointed_iteration.txt").exists():
            execute(training(sick, demo=demo, work=work, run=run))
    given.output.mkdir(parents=True, exist_ok=True)
    for stage, figure in pictures(demo, work).items():
        path = given.output / f"curves_{stage}.png"
        figure.savefig(path, dpi=90)
        print(path)
    return 0


def folder_of(name: str) -> str:
    """Of a run, in --work."""
    return name.replace(" ", "_").replace(":", "")


def shuffle_answers(demo: Path, work: Path) -> None:
    """Shards of the demo's images in which each answer is that of another image."""
    if (work / "shuffled").exists():
        return
    lines = (demo / "data" / "train.jsonl").read_text().splitlines()[:NUM_SHUFFLED]
    samples = [json.loads(line) for line in lines]
    answers = [turn for each in samples for turn in each["conversations"] if turn["from"] == "gpt"]
    texts = [turn["value"] for turn in answers]
    random.Random(0).shuffle(texts)
    for turn, text in zip(answers, texts, strict=True):
        turn["value"] = text
    work.mkdir(parents=True, exist_ok=True)
    jsonl = work / "shuffled.jsonl"
    jsonl.write_text("".join(f"{json.dumps(each)}\n" for each in samples))
    words = ["shards", "make", "--jsonl", f"{jsonl}", "--image-root", f"{demo / 'data'}"]
    words += ["--out", f"{work / 'shuffled'}", "--model-size", "toy", *TILING]
    execute([*words, "--tokenizer-model", f"{demo / 'tokenizer' / 'demo.model'}"])


def training(sick: Sick, *, demo: Path, work: Path, run: Path) -> list[str]:
    """The words behind `vico` of a sick run."""
    shards = demo / "shards" if sick.shards == "demo" else work / sick.shards
    words = ["train", "--recipe", f"{RECIPES / sick.recipe}.yaml", "--data-path", f"{shards}"]
    words += ["--tokenizer-model", f"{demo / 'tokenizer' / 'demo.model'}", "--save", f"{run}"]
    words += ["--pretrained-checkpoint", f"{demo / sick.start}", "--lr-decay-style", "constant"]
    words += ["--train-iters", f"{STEPS}", "--lr-warmup-iters", "10"]
    if sick.recipe == "router":
        words += ["--reference-load", f"{demo / 'pretrain'}"]
    return [*words, *sick.flags]


def execute(words: Sequence[str]) -> None:
    """Run a `vico` command and show it; a failure ends all."""
    command = [sys.executable, "-m", "megatron_vico", *words]
    print(f"$ {shlex.join(command)}", flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)


def pictures(demo: Path, work: Path) -> dict[str, Figure]:
    """A figure for each stage."""
    sick = {name: work / folder_of(name) for name in RUNS}
    healthy = {stage: demo / stage for stage in ("consistency", "router")}

    def runs(stage: str, *names: str) -> dict[str, Path]:
        return {"healthy": healthy[stage]} | {name: sick[name] for name in names}

    pretrain = {name: sick[name] for name in ("right answers", "shuffled answers")}
    consistency = runs("consistency", "rate 30 times as high", "no warm-up stage")
    router = runs("router", "window of one step", "router: rate 30 times as high")
    figures = {
        "pretrain": panels([("loss", pretrain)]),
        "consistency": panels([("loss", consistency), ("grad_norm", consistency)]),
        "router": panels([("router_threshold", router), ("router_auc", router)]),
        "kl": Figure(figsize=(5.4, 2.9), layout="constrained"),
    }
    panel = figures["kl"].subplots()
    for share in SHARES:
        name = f"kl_compressed_{share}"
        draw(panel, healthy["consistency"], name=name, label=name, steps=1800, smoothed=60)
    finish(panel, "kl_compressed_..., nats: healthy", is_log=True)
    panel.set_ylim(1e-3, 50)
    panel.legend(fontsize=8, ncols=3, loc="upper right")
    return figures


def panels(wanted: Sequence[tuple[str, dict[str, Path]]]) -> Figure:
    """One panel under another for each figure of metrics.jsonl, a line a run."""
    figure = Figure(figsize=(5.4, 2.9 * len(wanted)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(wanted), 1))
    for panel, (name, runs) in zip(axes, wanted, strict=True):
        for label, run in runs.items():
            draw(panel, run, name=name, label=label)
        finish(panel, name, is_log=name in ("grad_norm", "router_threshold"))
    return figure


def draw(
    panel: Axes, run: Path, *, name: str, label: str, steps: int = STEPS, smoothed: int = SMOOTHED
) -> None:
    """Every step in light, a running mean in dark."""
    values = read_metrics(run / "metrics.jsonl")[name][:steps]
    values = values[np.isfinite(values)]
    mean = np.convolve(values, np.ones(smoothed) / smoothed, mode="valid")
    (line,) = panel.plot(np.arange(len(mean)) + smoothed, mean, label=label, linewidth=1.6)
    panel.plot(np.arange(len(values)) + 1, values, color=line.get_color(), alpha=0.2, linewidth=0.7)


def finish(panel: Axes, title: str, *, is_log: bool) -> None:
    """Titles and scales."""
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("step", fontsize=9)
    panel.set_yscale("log" if is_log else "linear")
    panel.grid(alpha=0.25)
    panel.legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(main())
