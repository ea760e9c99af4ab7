"""Pictures: losses, a step's trace."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_vico.errors import CheckpointError, ConfigError
from megatron_vico.files import read_json, read_json_lines


def read_metrics(path: Path) -> dict[str, npt.NDArray[np.float64]]:
    """Every numeric key of a metrics.jsonl -> its values in order; NaN in lines that lack the key.

    Damaged lines, such as half a last one of a run that was killed, are left out; ConfigError if
    none is left.
    """
    lines, _ = read_json_lines(path)
    if not lines:
        raise ConfigError(f"{path}: no step in it; nothing to draw.")
    keys = {key for line in lines for key, value in line.items() if isinstance(value, int | float)}
    return {
        key: np.array([_number(line.get(key)) for line in lines], dtype=np.float64)
        for key in sorted(keys)
    }


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else math.nan


def loss_curves(metrics_files: Mapping[str, Path], *, columns: int = 3) -> Figure:
    """The loss of each stage (title -> its metrics.jsonl) over its steps, one panel a stage.

    Every step is light, a running mean dark, losses on the validation set are points.
    """
    columns = min(columns, len(metrics_files))
    rows = math.ceil(len(metrics_files) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows), layout="constrained")
    panels: list[Axes] = list(np.atleast_1d(figure.subplots(rows, columns)).flat)
    for panel, (title, path) in zip(panels, metrics_files.items(), strict=False):
        _draw_loss(panel, read_metrics(path), title=title)
    for panel in panels[len(metrics_files) :]:
        panel.set_axis_off()
    return figure


def _draw_loss(panel: Axes, metrics: Mapping[str, npt.NDArray[np.float64]], *, title: str) -> None:
    panel.set_title(title)
    panel.set_xlabel("step")
    panel.set_ylabel("loss")
    panel.grid(alpha=0.3)
    if "loss" not in metrics:
        panel.text(0.5, 0.5, "no losses", ha="center", va="center", transform=panel.transAxes)
        return
    steps = metrics.get("iteration", np.arange(1.0, len(metrics["loss"]) + 1))
    if "valid_loss" in metrics:
        panel.plot(steps, metrics["valid_loss"], ".", color="tab:orange", label="validation")
        panel.legend(loc="lower left")
    is_step = ~np.isnan(metrics["loss"])
    steps, loss = steps[is_step], metrics["loss"][is_step]
    if (loss > 0).all():
        panel.set_yscale("log")
    panel.plot(steps, loss, color="tab:blue", alpha=0.3, linewidth=0.8)
    window = max(1, len(loss) // 20)
    smooth = np.convolve(loss, np.full(window, 1 / window), mode="valid")
    panel.plot(steps[window - 1 :], smooth, color="tab:blue", linewidth=1.6)
    panel.text(
        0.97, 0.95, f"end: {smooth[-1]:.3g}", ha="right", va="top", transform=panel.transAxes
    )


_COLOURS = {
    ("reference", "forward"): ("tab:blue", "reference forward"),
    ("policy", "forward"): ("moccasin", "policy forward"),
    ("policy", "loss"): ("gold", "policy head and loss"),
    ("policy", "backward"): ("tab:orange", "policy backward"),
}
_OTHER_PHASES = ("gainsboro", "encode tiles, deliver tokens, encoder backward, optimizer")
_CHARACTER_INCHES = 0.085
"""Width of a digit in a box."""

_SPAN = re.compile(r"(?P<model>.+) (?P<kind>\w+) pack (?P<pack>\d+) chunk (?P<chunk>\d+)")
_PHASE = re.compile(r"phase: (?P<model>.+)")
"""Names of the parts of a step (training/pipeline_schedule.py, training/profiler.py)."""


@dataclass(frozen=True, kw_only=True)
class TraceBox:
    """What a rank did from one moment to another."""

    rank: int
    model: str
    """reference, policy, policy (none), policy (one), or the name of a phase."""

    kind: str
    """forward, loss, backward or phase."""

    pack: int | None = None
    chunk: int | None = None
    start_ms: float
    """From the first moment of the step on any rank."""

    end_ms: float


def read_trace(folder: Path) -> list[TraceBox]:
    """The last step in a folder of --profile: rank_0000.json and so on, in Chrome's trace format.

    Boxes are in order of their beginnings; there are none if the folder has no such file.
    """
    boxes = [box for file in sorted(folder.glob("rank_*.json")) for box in _boxes(file)]
    origin_ms = min((box.start_ms for box in boxes), default=0.0)
    moved = [
        replace(box, start_ms=box.start_ms - origin_ms, end_ms=box.end_ms - origin_ms)
        for box in boxes
    ]
    return sorted(moved, key=lambda box: box.start_ms)


def _boxes(file: Path) -> list[TraceBox]:
    try:
        return list(_last_step(read_json(file), int(file.stem.removeprefix("rank_"))))
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is no trace of a rank ({error!r}); write it again with --profile."
        ) from error


def _last_step(trace: Mapping[str, Any], rank: int) -> Iterator[TraceBox]:
    """The named ranges of the last step of a trace, in milliseconds of the machine's clock."""
    events = [event for event in trace["traceEvents"] if "dur" in event]
    # On a GPU each range also comes with the time in which its kernels ran.
    on_gpu = any(event.get("cat") == "gpu_user_annotation" for event in events)
    wanted = "gpu_user_annotation" if on_gpu else "user_annotation"
    ranges = [event for event in events if event.get("cat") == wanted]
    starts = [event["ts"] for event in ranges if event["name"].startswith("ProfilerStep#")]
    for event in ranges:
        span, phase = _SPAN.fullmatch(event["name"]), _PHASE.fullmatch(event["name"])
        named = span or phase
        if named is None or event["ts"] < max(starts, default=0.0):
            continue
        start_ms = (event["ts"] + trace.get("baseTimeNanoseconds", 0) / 1000) / 1000
        yield TraceBox(
            rank=rank,
            model=named["model"],
            kind=span["kind"] if span else "phase",
            pack=int(span["pack"]) if span else None,
            chunk=int(span["chunk"]) if span else None,
            start_ms=start_ms,
            end_ms=start_ms + event["dur"] / 1000,
        )


def trace_picture(boxes: Sequence[TraceBox], *, title: str = "") -> Figure:
    """Who does what when in one step: a row a rank, a colour a kind of work, a box a pack.

    Two lines mark the moments between which reference and policy overlap: the first policy forward
    pass on any rank begins, the last reference forward pass on any rank ends.
    """
    ranks = sorted({box.rank for box in boxes})
    figure = Figure(figsize=(14, 1.6 + 0.5 * len(ranks)), layout="constrained")
    axes = figure.add_subplot()
    end_ms = max(box.end_ms for box in boxes)
    labels: set[str] = set()
    num_chunks = 1 + max((box.chunk for box in boxes if box.chunk is not None), default=0)
    for box in boxes:
        colour, label = _COLOURS.get((box.model.split()[0], box.kind), _OTHER_PHASES)
        row, length_ms = ranks.index(box.rank), box.end_ms - box.start_ms
        axes.barh(
            row,
            length_ms,
            left=box.start_ms,
            height=0.8,
            color=colour,
            edgecolor="black",
            linewidth=0.4,
            label=label if label not in labels else "_",
        )
        labels.add(label)
        text = _box_text(box, num_chunks)
        if len(text) * _CHARACTER_INCHES < 13 * length_ms / end_ms:
            ink = "white" if box.model == "reference" else "black"
            middle = box.start_ms + length_ms / 2
            axes.text(middle, row, text, ha="center", va="center", fontsize=8, color=ink)
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks])
    axes.set_ylim(len(ranks) - 0.5, -1.1)
    axes.set_xlim(0, end_ms)
    axes.set_xlabel("ms")
    axes.set_title(title)
    _mark_overlap(axes, boxes)
    figure.legend(loc="outside lower center", ncols=len(labels), fontsize=9)
    return figure


def _box_text(box: TraceBox, num_chunks: int) -> str:
    """The pack, and a letter for the chunk where a rank has several; nothing for other phases."""
    if box.pack is None or box.kind == "loss":
        return ""
    return str(box.pack) + (chr(ord("a") + (box.chunk or 0)) if num_chunks > 1 else "")


def _mark_overlap(axes: Axes, boxes: Sequence[TraceBox]) -> None:
    begins = [
        box.start_ms for box in boxes if box.model.startswith("policy") and box.kind == "forward"
    ]
    ends = [box.end_ms for box in boxes if box.model == "reference"]
    if not begins or not ends:
        return
    for at_ms, text, side in (
        (min(begins), "first policy forward begins ", "right"),
        (max(ends), " last reference forward ends", "left"),
    ):
        axes.axvline(at_ms, color="crimson", linewidth=1.2, linestyle="--")
        axes.text(at_ms, -0.75, text, ha=side, va="center", fontsize=9, color="crimson")
