"""Figures about a trained model: Figure 1b of the ViCO paper, compression by content, ratios."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from megatron_vico.errors import ConfigError
from megatron_vico.evaluation.plots import read_metrics
from megatron_vico.evaluation.runner import RowResult


@dataclass(frozen=True, kw_only=True)
class Bubble:
    """One model under one plan in Figure 1b."""

    name: str
    score: float
    """Mean over benchmarks, each of 100."""

    throughput: float
    """First tokens a second, over those of the model that is 1."""

    parameters_b: float
    """In billions; the bubble's area."""

    group: str
    """Bubbles of a group share a colour: base, ViCO."""


def bubble_chart(bubbles: Sequence[Bubble]) -> Figure:
    """Score against relative first-token throughput; same names are joined by a line."""
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    groups = list(dict.fromkeys(bubble.group for bubble in bubbles))
    largest = max(bubble.parameters_b for bubble in bubbles)
    for name in dict.fromkeys(bubble.name for bubble in bubbles):
        own = [bubble for bubble in bubbles if bubble.name == name]
        places = [(bubble.throughput, bubble.score) for bubble in own]
        axes.plot(*zip(*places, strict=True), color="grey", linewidth=1, linestyle=":", zorder=1)
    for bubble in bubbles:
        area = 30 + 1100 * bubble.parameters_b / largest
        colour = f"C{groups.index(bubble.group)}"
        place = (bubble.throughput, bubble.score)
        axes.scatter(*place, s=area, color=colour, alpha=0.55, edgecolor="white", zorder=2)
        above = (0, np.sqrt(area) / 2 + 2)
        axes.annotate(
            *(bubble.name, place), above, textcoords="offset points", ha="center", fontsize=8
        )
    axes.set_xscale("log")
    axes.set_xlabel("first-token throughput, relative")
    axes.set_ylabel("mean score")
    axes.margins(0.14)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    marks = [
        Line2D([], [], marker="o", linestyle="", color=f"C{number}", alpha=0.55, label=group)
        for number, group in enumerate(groups)
    ]
    axes.legend(handles=marks, loc="best")
    return figure


def compression_by_content(result: RowResult) -> Figure:
    """Share of compressed tiles for each kind of content, with the score beside it.

    Raises:
        ConfigError: if the set does not have a question for each tile.
    """
    if not result.compressed_by_kind:
        raise ConfigError(f"row {result.row}: no compressed_by_kind; ask one question a tile.")
    kinds = sorted(result.compressed_by_kind, key=lambda kind: result.compressed_by_kind[kind])
    figure = Figure(figsize=(6.4, 0.9 + 0.52 * len(kinds)), layout="constrained")
    axes = figure.add_subplot()
    for row, kind in enumerate(kinds):
        share = 100 * result.compressed_by_kind[kind]
        axes.barh(row, share, color="C0", height=0.62)
        axes.text(share + 1, row, f"{share:.0f} %", va="center", fontsize=9)
    labels = [
        f"{kind}\nscore {100 * result.score_by_kind[kind]:.1f}, n = {count:,}"
        for kind in kinds
        for count in [result.num_questions_by_kind[kind]]
    ]
    axes.set_yticks(range(len(kinds)), labels, fontsize=8)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("tiles compressed, %")
    axes.axvline(100 * result.compressed_tiles, color="grey", linestyle="--", linewidth=1)
    axes.set_title(f"all tiles: {100 * result.compressed_tiles:.0f} % (dashed)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def ratio_window(metrics: Path) -> Figure:
    """Loss ratios of Eq. 2 in the sliding window, and the threshold of Eq. 3, over the steps.

    Raises:
        ConfigError: if the run is not of the router stage.
    """
    found = read_metrics(metrics)
    if "router_threshold" not in found:
        raise ConfigError(f"{metrics}: no router_threshold; give a run of the router stage.")
    rows = ~np.isnan(found["router_threshold"])
    steps = found.get("iteration", np.arange(1.0, len(rows) + 1))[rows]
    low, middle, high = (found[f"router_ratio_p{share}"][rows] for share in (10, 50, 90))
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    upper.fill_between(steps, low, high, alpha=0.2, linewidth=0, label="10 % to 90 % of the window")
    upper.plot(steps, middle, linewidth=1, label="median")
    threshold = found["router_threshold"][rows]
    upper.plot(steps, threshold, color="crimson", linewidth=1.6, label="threshold")
    if min(low.min(), threshold.min()) > 0:
        upper.set_yscale("log")
    upper.set_ylabel("loss ratio r (Eq. 2)")
    upper.legend(loc="best", fontsize=8)
    for name, label in (
        ("router_labelled_compress", "labelled"),
        ("router_predicted_compress", "predicted by ViR"),
    ):
        if name in found:
            width = max(1, len(steps) // 20)
            smooth = np.convolve(found[name][rows], np.full(width, 1 / width), mode="valid")
            lower.plot(steps[width - 1 :], 100 * smooth, label=label)
    lower.set_ylabel("compress, %")
    lower.set_xlabel("step")
    lower.set_ylim(0, 100)
    lower.legend(loc="best", fontsize=8)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    return figure
