"""A plan of ranks as text for the terminal."""

from collections import Counter
from collections.abc import Mapping

from megatron_vico.planning.cards import CARDS, RESERVE
from megatron_vico.planning.closed_forms import Estimate, Machine
from megatron_vico.planning.meter import STATIC
from megatron_vico.planning.plan import RankPlan

_PARTS = (*STATIC, "visual tokens", "activations", "encoder activations", "head")


def shortage(plan: RankPlan, gpu: str) -> float:
    """Bytes that the rank lacks on a card; negative, so many are free beside the reserve."""
    return plan.peak_bytes - (1 - RESERVE) * CARDS[gpu]


def memory_table(plans: Mapping[str, RankPlan], gpu: str) -> list[str]:
    """GB by part, a column a rank: between steps, and at the peak."""
    names = [f"{name} stage (rank {plan.rank})" for name, plan in plans.items()]
    width = max(map(len, names)) + 2
    lines = [f"{'GB':22}" + "".join(f"{name:>{width}}" for name in names)]
    rows: dict[str, list[float]] = {}
    found = {part for plan in plans.values() for part in plan.peak}
    for part in (*_PARTS, *sorted(found - set(_PARTS))):
        if part in found:
            rows[part] = [plan.peak.get(part, 0) for plan in plans.values()]
    rows["static, of that"] = [sum(plan.static.values()) for plan in plans.values()]
    rows["peak"] = [plan.peak_bytes for plan in plans.values()]
    rows[f"reserve ({RESERVE:.0%})"] = [RESERVE * CARDS[gpu]] * len(plans)
    rows[f"free of {CARDS[gpu] / 1e9:.1f}"] = [-shortage(plan, gpu) for plan in plans.values()]
    for name, sizes in rows.items():
        lines.append(f"{name:22}" + "".join(f"{size / 1e9:{width}.2f}" for size in sizes))
    return lines


def rank_details(name: str, plan: RankPlan) -> list[str]:
    """Where the peak is, the largest tensors, traffic, FLOPs and host waits of a rank."""
    by_group: dict[tuple[str, str], Counter[str]] = {}
    for each in plan.traffic:
        entry = by_group.setdefault((each.group, _kind(each.call)), Counter())
        entry.update(calls=round(each.calls), bytes=round(each.num_bytes))
    lines = [
        "",
        f"{name} stage, rank {plan.rank}, {plan.packs} packs a step{_measured(plan)}: peak"
        f" {plan.peak_bytes / 1e9:.1f} GB in {plan.peak_phase}; highest in each phase: "
        + ", ".join(f"{phase} {size / 1e9:.1f}" for phase, size in plan.peaks.items()),
        "  largest tensors of the step at the peak:",
        *(
            f"  {size / 1e9:8.2f} GB {number:5} x {text}"
            for text, size, number in plan.tensors
            if size > 1e8
        ),
        "  traffic by group:",
        *(
            f"  {entry['bytes'] / 1e9:8.2f} GB {entry['calls']:5} x {kind} over {group}"
            for (group, kind), entry in sorted(by_group.items(), key=lambda item: -item[1]["bytes"])
            if entry["bytes"] > 1e7
        ),
        f"  TFLOP {sum(plan.flops.values()) / 1e12:.1f}: "
        + ", ".join(f"{phase} {flops / 1e12:.1f}" for phase, flops in plan.flops.items()),
        "  host waits: "
        + (", ".join(f"{count:.0f} x {why}" for why, count in plan.waits.items()) or "none"),
    ]
    return lines


def time_line(time: Estimate, machine: Machine, *, fp8: bool) -> str:
    """Seconds of a step by formula."""
    note = "; of FP8, weights are counted, but neither its activations nor its speed" if fp8 else ""
    return (
        f"a step by formula, at {machine.efficiency:.0%} of {machine.flops_per_s / 1e12:.0f}"
        f" TFLOP/s: {time.expected_s:.1f} s, the bubble {time.bubble:.1%} of the passes; floor"
        f" {time.floor_s:.1f} s{note}"
    )


def verdict(worst: RankPlan, gpu: str) -> str:
    """Whether the rank that takes most fits, and by how much."""
    lacks = shortage(worst, gpu)
    if lacks <= 0:
        return f"fits: {-lacks / 1e9:.1f} GB are free beside the reserve"
    return (
        f"does not fit: rank {worst.rank} lacks {lacks / 1e9:.1f} GB; it takes"
        f" {worst.peak_bytes / 1e9:.1f} and {RESERVE * CARDS[gpu] / 1e9:.1f} in reserve, of"
        f" {CARDS[gpu] / 1e9:.1f}"
    )


def _measured(plan: RankPlan) -> str:
    if plan.packs in plan.measured_packs:
        return ""
    steps = " and ".join(map(str, plan.measured_packs))
    return f" (from steps of {steps}; {plan.bytes_per_pack / 1e9:.3f} GB a further pack)"


def _kind(call: str) -> str:
    """all-gather of whatever form."""
    for word in ("allgather", "reduce_scatter", "allreduce", "alltoall", "broadcast", "send"):
        if word in call:
            return word
    return "recv" if "recv" in call else call.strip("_")
