#!/usr/bin/env python3
"""A table and plots of scaling runs, beside what `vico plan` said of them.

    python tools/scaling_report.py runs/scaling --plot scaling.png
    python tools/scaling_report.py runs/scaling --format markdown > scaling.md

A run is a folder with metrics.jsonl; its series is the name of the folder above (examples/scaling/
sweep.sh makes such). Figures are medians without the first steps. Efficiency is tokens/s/GPU over
that of the fewest ranks of the series: strong where the global batch is the same, weak where it
grows with the ranks.
"""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from megatron_vico.errors import USER_ERRORS, ConfigError
from megatron_vico.evaluation.run_figures import RunFigures, planned, read_run

PHASES = ("encode", "reference", "policy", "encoder_backward", "optimizer")
_SIZES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of a series; a figure that was not measured is None."""

    series: str
    name: str
    run: RunFigures

    @property
    def batch(self) -> int:
        """Packs of a step."""
        return int(self.run.config.get("global_batch_size", 256))

    def efficiency(self, base: "Case") -> dict[str, float | None]:
        """Weak and strong, of which at most one has a number (both, for the base itself)."""
        own, first = (each.run.median("tokens_per_s_per_gpu") for each in (self, base))
        ratio = own / first if own and first else None
        ranks, base_ranks = self.run.world_size, base.run.world_size
        return {
            "weak": ratio if self.batch * base_ranks == base.batch * ranks else None,
            "strong": ratio if self.batch == base.batch else None,
        }

    def shares(self) -> dict[str, float]:
        """Of a step's time, by phase."""
        step_s = self.run.median("step_time_s") or 1.0
        seconds = {phase: self.run.median(f"{phase}_s") for phase in PHASES}
        return {phase: value / step_s for phase, value in seconds.items() if value is not None}

    def cells(self, base: "Case") -> dict[str, str]:
        """A row of the table."""
        run, config = self.run, self.run.config
        sizes = [f"{short}{config[name]}" for short, name in _SIZES.items() if name in config]
        plan = None if run.plan is None else planned(run.plan)
        precision = config.get("fp8_format") or ("bf16" if config.get("bf16") else "fp32")
        rate, step_s = run.median("tflops_per_gpu"), run.median("step_time_s")
        shares, efficiency = self.shares(), self.efficiency(base)
        return {
            "series": self.series,
            "run": self.name,
            "ranks": str(run.world_size),
            "layout": " ".join(sizes) or "DP",
            "precision": precision,
            "packs": str(self.batch),
            "step s": _number(step_s, ".3g"),
            "step s planned": _number(plan and plan.expected_s, ".3g"),
            "tokens/s/GPU": _number(run.median("tokens_per_s_per_gpu"), ".1f"),
            "TFLOP/s/GPU": _number(rate, ".4g"),
            "MFU": _number(run.median("mfu"), ".1%"),
            **{name: _number(value, ".1%") for name, value in efficiency.items()},
            **{phase.replace("_", " "): _number(shares.get(phase), ".0%") for phase in PHASES},
            "GB": _number(run.median("memory_allocated_gb"), ".1f"),
            "GB planned": _number(plan and plan.peak_gb, ".1f"),
            "TFLOP": _number(rate and step_s and rate * step_s, ".4g"),
            "TFLOP planned": _number(plan and plan.tflop_per_gpu, ".4g"),
        }


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def find_cases(roots: Sequence[Path]) -> list[list[Case]]:
    """The runs below some folders by series, each with the fewest ranks first.

    A run that cannot be read is named on stderr and left out.

    Raises:
        ConfigError: if there is none.
    """
    series: dict[str, list[Case]] = {}
    for path in sorted(path for root in roots for path in root.glob("**/metrics.jsonl")):
        try:
            run = read_run(path.parent)
        except ConfigError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        folder = path.parent.resolve()
        case = Case(series=folder.parent.name, name=folder.name, run=run)
        series.setdefault(case.series, []).append(case)
    if not series:
        words = " ".join(map(str, roots))
        raise ConfigError(
            f"{words}: no run with a metrics.jsonl below; give the folder of a sweep."
        )
    return [sorted(cases, key=lambda case: case.run.world_size) for cases in series.values()]


def table(rows: Sequence[dict[str, str]], form: str) -> str:
    """Text, Markdown or CSV; columns that no row has anything in are left out."""
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = [names, *([row[name] for name in names] for row in rows)]
    if form == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(lines)
        return text.getvalue().rstrip("\n")
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    padded = [
        [cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    ]
    if form == "text":
        return "\n".join("  ".join(line) for line in padded)
    rule = ["-" * (width - 1) + ":" for width in widths]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))


def plot(series: Sequence[Sequence[Case]]) -> Figure:
    """Tokens and TFLOP/s a GPU over ranks, a line a series; shares of a step, a bar a run."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    tokens, arithmetic, phases = figure.subplots(1, 3)
    for axes, name, label in (
        (tokens, "tokens_per_s_per_gpu", "tokens/s/GPU"),
        (arithmetic, "tflops_per_gpu", "TFLOP/s/GPU"),
    ):
        for cases in series:
            shown = [case for case in cases if case.run.median(name) is not None]
            ranks = [case.run.world_size for case in shown]
            axes.plot(ranks, [case.run.median(name) for case in shown], "o-", label=cases[0].series)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("ranks")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    tokens.legend(fontsize=8)
    flat = [case for cases in series for case in cases]
    names, left = [f"{case.series}/{case.name}" for case in flat], [0.0] * len(flat)
    for phase in PHASES:
        widths = [case.shares().get(phase, 0.0) for case in flat]
        phases.barh(names, widths, left=left, label=phase.replace("_", " "))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    phases.invert_yaxis()
    phases.set_xlabel("share of a step")
    phases.tick_params(axis="y", labelsize=8)
    phases.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, draw the plots; exit status 0, or 2 after an error of the user's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders with runs somewhere below")
    parser.add_argument("--format", choices=("text", "markdown", "csv"), default="text")
    parser.add_argument("--plot", type=Path, help="picture to write; its ending says the format")
    options = parser.parse_args(arguments)
    try:
        series = find_cases(options.runs)
    except USER_ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(table([case.cells(cases[0]) for cases in series for case in cases], options.format))
    if options.plot is not None:
        plot(series).savefig(options.plot, dpi=110)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
