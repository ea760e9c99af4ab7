"""Plots of a data set: lengths, tiles and images of its samples, and how full its packs are."""

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from megatron_vico.data.samples import IntArray
from megatron_vico.shard_tools.report import KINDS, PackingFill, ShardStatistics

_COLOURS = ("tab:grey", "tab:blue", "tab:orange")
"""Of KINDS."""

_MAX_BARS = 80
_LOG_FROM = 10
"""Largest over smallest number, from which an axis of tokens is logarithmic."""


def shard_figure(statistics: ShardStatistics, *, title: str = "") -> Figure:
    """A panel for each number of a sample, stacked by kind of sample, and two for the packs."""
    packing = statistics.packing
    columns = 2 if packing is None else 3
    figure = Figure(figsize=(4.4 * columns, 6.6), layout="constrained")
    panels: list[Axes] = list(figure.subplots(2, columns).flat)
    names = (statistics.length_column, "trained tokens", "tiles", "images")
    for panel, name in zip((*panels[:2], *panels[columns : columns + 2]), names, strict=True):
        _stacked(panel, statistics, name=name, may_be_log="tokens" in name)
    if packing is not None:
        _fill(panels[2], packing, packing.tokens, packing.limits.capacity, unit="tokens")
        _fill(panels[5], packing, packing.tiles, packing.limits.max_tiles, unit="tiles")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(KINDS))
    figure.suptitle(title or f"{len(statistics.num_tokens):,} samples")
    return figure


def _stacked(panel: Axes, statistics: ShardStatistics, *, name: str, may_be_log: bool) -> None:
    values = statistics.columns[name]
    is_log = may_be_log and int(values.max()) > _LOG_FROM * max(1, int(values.min()))
    bins = _log_bins(values) if is_log else _whole_bins(values)
    panel.hist(
        # A log axis has no place for 0, which shares the first bar.
        [np.maximum(values[statistics.kinds == kind], bins[0]) for kind in range(len(KINDS))],
        bins=bins.tolist(),
        stacked=True,
        color=_COLOURS,
        label=[f"{kind}: {count:,}" for kind, count in statistics.num_of_kind.items()],
    )
    if is_log:
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
    else:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    panel.set_title(name)
    panel.set_xlabel(f"per sample ({values.sum():,} in all)")
    _count_axis(panel, "samples")


def _fill(panel: Axes, packing: PackingFill, sums: IntArray, limit: int, *, unit: str) -> None:
    shares = 100 * sums / limit
    if len(sums):
        panel.hist(shares, bins=np.linspace(0, 100, 41).tolist(), color="tab:green")
        panel.axvline(shares.mean(), color="crimson", linewidth=1.2, linestyle="--")
        panel.set_title(f"packs, {shares.mean():.1f} % full in {unit}")
    else:
        panel.set_title(f"no packs, in {unit}")
    panel.set_xlim(0, 100)
    panel.set_xlabel(
        f"% of {limit:,} {unit}\n{len(sums):,} packs, {packing.samples_per_pack:.1f} samples each"
    )
    _count_axis(panel, "packs")


def _count_axis(panel: Axes, name: str) -> None:
    panel.set_ylabel(name)
    panel.yaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    panel.grid(alpha=0.3)


def _log_bins(values: IntArray) -> npt.NDArray[np.float64]:
    low, high = max(1, int(values.min())), max(1, int(values.max()))
    return np.geomspace(low, high + 1, 41)


def _whole_bins(values: IntArray) -> npt.NDArray[np.float64]:
    """Edges half way between whole numbers, several numbers a bar where bars would be too many."""
    low, high = int(values.min()), int(values.max())
    step = (high - low) // _MAX_BARS + 1
    return np.arange(low - 0.5, high + step, step)
