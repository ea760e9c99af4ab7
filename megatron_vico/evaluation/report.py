"""`vico report`: one HTML page about a run, with everything in it.

Curves, throughput, phases, routing samples, plan against measured, configuration. It needs nothing
but metrics.jsonl; what else lies in the folder is shown too.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from megatron_vico.errors import ConfigError
from megatron_vico.evaluation.run_figures import RunFigures, planned, read_run

MAX_POINTS = 400
_PICTURE_PX = 1400
_PHASES = ("encode_s", "reference_s", "policy_s", "encoder_backward_s", "optimizer_s")
_SHARES = ("0", "25", "50", "75", "100")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Some figures of a run over its steps."""

    title: str
    unit: str
    names: tuple[str, ...]
    labels: tuple[str, ...] = ()
    scale: str = "linear"
    kind: str = "lines"


PANELS = (
    Panel(
        title="Loss",
        unit="nats",
        names=("loss", "valid_loss", "valid_loss_all_compressed"),
        labels=("training", "validation", "validation, all compressed"),
        scale="log",
    ),
    Panel(
        title="KL by share of compressed tiles",
        unit="nats",
        names=tuple(f"kl_compressed_{share}" for share in _SHARES),
        labels=("none", "to 25 %", "to 50 %", "to 75 %", "to 100 %"),
        scale="log",
    ),
    Panel(
        title="Router",
        unit="share of questions, area",
        names=("router_accuracy", "router_auc", "valid_router_accuracy"),
        labels=("accuracy", "AUC", "accuracy, validation"),
    ),
    Panel(
        title="Loss ratios and threshold",
        unit="r of Eq. 2",
        names=("router_ratio_p10", "router_ratio_p50", "router_ratio_p90", "router_threshold"),
        labels=("10 %", "50 %", "90 %", "threshold"),
        scale="log",
    ),
    Panel(
        title="Compressed tiles",
        unit="share",
        names=("compressed_tiles", "router_labelled_compress", "router_predicted_compress"),
        labels=("seen by the policy", "labelled", "predicted by ViR"),
    ),
    Panel(title="Gradient norm", unit="norm", names=("grad_norm",), scale="log"),
    Panel(title="Learning rate", unit="rate", names=("learning_rate",)),
    Panel(title="Tokens", unit="tokens/s/GPU", names=("tokens_per_s_per_gpu",)),
    Panel(title="Arithmetic", unit="TFLOP/s/GPU", names=("tflops_per_gpu",)),
    Panel(title="MFU", unit="share of the bf16 peak", names=("mfu",)),
    Panel(
        title="Time of phases",
        unit="s (mean over ranks)",
        names=_PHASES,
        labels=("encode", "reference", "policy", "encoder backward", "optimizer"),
        kind="stack",
    ),
    Panel(title="Step", unit="s", names=("step_time_s",)),
    Panel(
        title="Memory, highest so far",
        unit="GB (fullest rank)",
        names=("memory_allocated_gb", "memory_reserved_gb"),
        labels=("allocated", "reserved"),
    ),
    Panel(title="Work of the busiest replica", unit="over the mean", names=("work_imbalance",)),
    Panel(title="Fill of packs", unit="share of tokens", names=("fill",)),
)

_HEADLINES = (
    ("tokens/s", "tokens_per_s", "{:,.0f}"),
    ("tokens/s/GPU", "tokens_per_s_per_gpu", "{:,.1f}"),
    ("TFLOP/s/GPU", "tflops_per_gpu", "{:.4g}"),
    ("MFU", "mfu", "{:.1%}"),
    ("seconds a step", "step_time_s", "{:.4g}"),
    ("GB allocated at most", "memory_allocated_gb", "{:.1f}"),
    ("GB reserved at most", "memory_reserved_gb", "{:.1f}"),
    ("fill of packs", "fill", "{:.1%}"),
    ("busiest replica over the mean", "work_imbalance", "{:.3f}"),
    ("compressed tiles", "compressed_tiles", "{:.1%}"),
)


def runs_of(folder: Path) -> list[Path]:
    """The folder if it is a run (or its metrics.jsonl), else its subfolders that are, oldest first.

    Raises:
        ConfigError: if there is none.
    """
    if folder.is_file() or (folder / "metrics.jsonl").is_file():
        return [folder]
    files = sorted(folder.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ConfigError(
            f"{folder}: no metrics.jsonl in it or in its subfolders; give the --save folder of a"
            " run, or a folder of such folders."
        )
    return [path.parent for path in files]


def report_page(folder: Path) -> str:
    """The page; a run that cannot be read has its error in its place.

    Raises:
        ConfigError: if there is no run, or the only one cannot be read.
    """
    sections, errors = [], []
    for path in runs_of(folder):
        try:
            sections.append(_section(read_run(path)))
        except ConfigError as error:
            errors.append(error)
    if not sections:
        raise errors[0]
    template = jinja2.Template(
        (Path(__file__).parent / "report.html").read_text(encoding="utf-8"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return template.render(
        title=folder.resolve().name,
        sections=sections,
        errors=[str(error) for error in errors],
        pictures=list(_pictures(folder if folder.is_dir() else folder.parent)),
    )


def _section(run: RunFigures) -> dict[str, object]:
    """What the template shows of one run."""
    last, config = run.steps[-1], run.config
    facts = {
        "stage": config.get("stage", "?"),
        "model": config.get("model_size", "?"),
        "steps": f"{last['iteration']:,} of {config.get('train_iters', '?')}",
        "ranks": run.world_size,
        "loss at the end": f"{last['loss']:.4g}",
    }
    if run.validation:
        facts["validation"] = f"{run.validation[-1]['valid_loss']:.4g}"
    headlines = [
        (label, form.format(np.median(values)), form.format(min(values)), form.format(max(values)))
        for label, name, form in _HEADLINES
        if (values := run.values(name))
    ]
    return {
        "name": run.folder.resolve().name,
        "facts": facts,
        "damaged": run.damaged,
        "headlines": headlines,
        "phases": list(_phase_rows(run)),
        "plan": list(_plan_rows(run)),
        "panels": [_svg(panel, run) for panel in PANELS if _has_any(panel, run)],
        "config": run.config_text,
    }


def _phase_rows(run: RunFigures) -> Iterator[tuple[str, str, str]]:
    step_s = run.median("step_time_s")
    found = {name: value for name in _PHASES if (value := run.median(name)) is not None}
    if not found or not step_s:
        return
    found["outside of them"] = max(step_s - sum(found.values()), 0.0)
    for name, seconds in found.items():
        label = name.removesuffix("_s").replace("_", " ")
        yield label, f"{seconds:.3g}", f"{seconds / step_s:.1%}"


def _plan_rows(run: RunFigures) -> Iterator[tuple[str, str, str]]:
    if run.plan is None:
        return
    plan = planned(run.plan)
    yield "ranks", str(plan.world_size), str(run.world_size)
    memory = run.median("memory_allocated_gb")
    yield (
        f"GB at most on the fullest rank ({plan.gpu})",
        f"{plan.peak_gb:.1f}",
        "not measured on a CPU" if memory is None else f"{memory:.1f}",
    )
    rate, step_s = run.median("tflops_per_gpu"), run.median("step_time_s")
    if plan.expected_s is not None:
        yield (
            "seconds a step (planned: by formula)",
            f"{plan.expected_s:.3g}",
            "?" if step_s is None else f"{step_s:.3g}",
        )
    measured = "?" if rate is None or step_s is None else f"{rate * step_s:.4g}"
    yield (
        "TFLOP a step and GPU (planned: with what is recomputed)",
        f"{plan.tflop_per_gpu:.4g}",
        measured,
    )


def _has_any(panel: Panel, run: RunFigures) -> bool:
    return any(name in row for row in (*run.steps, *run.validation) for name in panel.names)


def _svg(panel: Panel, run: RunFigures) -> str:
    """The panel as an SVG element."""
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(panel.title, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.kind == "stack":
        _draw_stack(axes, panel, run)
    else:
        _draw_lines(axes, panel, run)
    _, found = axes.get_legend_handles_labels()
    if len(found) > 1:
        figure.legend(
            loc="outside lower center", ncols=min(len(found), 3), fontsize=8, frameon=False
        )
    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _draw_lines(axes: Axes, panel: Panel, run: RunFigures) -> None:
    labels, positive = panel.labels or panel.names, True
    num_lines = sum(
        any(name in row for row in (*run.steps, *run.validation)) for name in panel.names
    )
    for name, label in zip(panel.names, labels, strict=True):
        from_validation = name.startswith("valid_")
        rows = [row for row in (run.validation if from_validation else run.steps) if name in row]
        if not rows:
            continue
        steps, values = _thinned(
            [row["iteration"] for row in rows], [float(row[name]) for row in rows]
        )
        positive &= bool((values[np.isfinite(values)] > 0).all())
        style = "o--" if from_validation else "." if len(steps) == 1 else "-"
        width = len(steps) // 20 if num_lines == 1 else 0
        (line,) = axes.plot(steps, values, style, label=label, linewidth=1.2, markersize=4)
        if width > 1:  # noise in light, a running mean in dark
            line.set_alpha(0.3)
            smooth = np.convolve(values, np.full(width, 1 / width), mode="valid")
            middle = steps[(width - 1) // 2 :][: len(smooth)]
            axes.plot(middle, smooth, color=line.get_color(), linewidth=1.6)
    if panel.scale == "log" and positive:
        axes.set_yscale("log")


def _draw_stack(axes: Axes, panel: Panel, run: RunFigures) -> None:
    rows = [row for row in run.steps if any(name in row for name in panel.names)]
    steps = [row["iteration"] for row in rows]
    stacks = [_thinned(steps, [row.get(name, 0.0) for row in rows]) for name in panel.names]
    shown = [
        (values, label)
        for (_, values), label in zip(stacks, panel.labels, strict=True)
        if values.any()
    ]
    axes.stackplot(
        stacks[0][0], [values for values, _ in shown], labels=[label for _, label in shown]
    )


def _thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS, each the mean of neighbours."""
    pieces = min(MAX_POINTS, len(steps))
    return (
        np.array([piece.mean() for piece in np.array_split(np.array(steps), pieces)]),
        np.array([piece.mean() for piece in np.array_split(np.array(values), pieces)]),
    )


def _pictures(folder: Path) -> Iterator[tuple[str, str]]:
    """Routing samples: what tools/visualize_routing.py drew, as routing*.png in the folder."""
    for path in sorted(folder.glob("**/routing*.png"))[:4]:
        with Image.open(path) as picture:
            small = picture.convert("RGB")
            small.thumbnail((_PICTURE_PX, _PICTURE_PX * 4))
            data = io.BytesIO()
            small.save(data, "JPEG", quality=85)
        encoded = base64.b64encode(data.getvalue()).decode()
        yield path.relative_to(folder).as_posix(), f"data:image/jpeg;base64,{encoded}"
