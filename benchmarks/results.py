#!/usr/bin/env python3
"""Fills benchmarks/RESULTS.md from what `make gpu` wrote.

    python -m benchmarks.results

Of each check the last result on a GPU counts, one for each device; lines of a CPU are left out. A
figure that has a goal stands beside it.
"""

import argparse
import operator
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.gpu.run import LIMITS_S, Line, lines_of

FOLDER = Path(__file__).resolve().parent
NOT_RUN = "Not run on a GPU yet: `make gpu` on one, then this command, fill this file.\n"
SHAPE = "8192 x 4096 x 151936"
AT_MOST, AT_LEAST = ("at most", operator.le), ("at least", operator.ge)
# Check and figure; the first two are of an H100.
GOALS: dict[tuple[str, str], tuple[tuple[str, Callable[[float, float], bool]], float]] = {
    ("kl_head", f"{SHAPE} ms"): (AT_MOST, 80),
    ("kl_head", f"{SHAPE} GB above inputs and outputs"): (AT_MOST, 1.7),
    ("kl_head", "32768 x 4096 x 151936 GB above inputs and outputs"): (AT_MOST, 1.7),
    ("kl_head", "textbook ms over ours"): (AT_LEAST, 2),
    ("kl_head", "Liger ms over ours"): (AT_LEAST, 1.5),
    ("kl_head", "rows' gradient, relative error"): (AT_MOST, 5e-3),
    ("kl_head", "head's gradient, relative error"): (AT_MOST, 5e-3),
    ("step_8b_width", "ViCO ms over SFT's"): (AT_MOST, 1.10),
    ("step_8b_width", "bf16 ms over FP8's"): (AT_LEAST, 1.25),
    ("step_8b_width", "ViCO MFU"): (AT_LEAST, 0.5),
    ("step_8b_width", "ViCO host waits before the norm"): (AT_MOST, 0),
    ("answers", "host waits a token"): (AT_MOST, 1),
}


def text_of(lines: Sequence[Line]) -> str:
    """The file: a section a device."""
    head = (
        "# Results on GPUs\n\nMade by `python -m benchmarks.results` of `benchmarks/gpu.jsonl`.\n\n"
    )
    of_device: dict[str, dict[str, Line]] = {}
    for line in lines:
        if line["device"] not in ("CPU", "none") and line["result"] != "cut off":
            of_device.setdefault(line["device"], {})[line["check"]] = line
    if not of_device:
        return head + NOT_RUN
    return head + "\n".join(_section(device, found) for device, found in of_device.items())


def _section(device: str, found: dict[str, Line]) -> str:
    rows = [f"## {device}\n", "| check | figure | value | goal |", "|---|---|---|---|"]
    for name in filter(found.get, LIMITS_S):
        line = found[name]
        if line["result"] != "ok":
            rows.append(f"| {name} | **{line['result']}** | {_cell(line['said'])} | |")
        for what, value in line.get("figures", {}).items():
            rows.append(f"| {name} | {what} | {_cell(value)} | {_goal(name, what, value)} |")
    missing = [name for name in LIMITS_S if name not in found]
    rows.append(f"\nNot run: {', '.join(missing)}.\n" if missing else "")
    for name, line in found.items():
        versions = ", ".join(f"{each} {has}" for each, has in line.get("versions", {}).items())
        rows.append(f"- {name}: commit {line['commit']}, {line['when']}; {versions}")
    return "\n".join(rows) + "\n"


def _goal(check: str, what: str, value: float | str) -> str:
    if (check, what) not in GOALS:
        return ""
    (words, holds), limit = GOALS[check, what]
    assert not isinstance(value, str)
    return f"{words} {limit:g}: {'reached' if holds(value, limit) else '**missed**'}"


def _cell(value: float | str) -> str:
    return f"{value:.4g}" if not isinstance(value, str) else value.replace("|", "\\|")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--journal", type=Path, default=FOLDER / "gpu.jsonl")
    parser.add_argument("--out", type=Path, default=FOLDER / "RESULTS.md")
    options = parser.parse_args(arguments)
    options.out.write_text(text_of(lines_of(options.journal)))


if __name__ == "__main__":
    main()
