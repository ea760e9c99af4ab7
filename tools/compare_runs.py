#!/usr/bin/env python3
"""Compares losses and gradient norms of two runs step by step.

    python tools/compare_runs.py runs/a runs/b --rtol 1e-5

A run is a folder with metrics.jsonl, a .jsonl file with one object a line, or a .json list of such
objects. Exits with status 1 where a step differs by more than the tolerance or stands in one run
only.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FIELDS = ("loss", "grad_norm")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The largest relative difference of one field over all steps."""

    field: str
    iteration: int
    first: float
    second: float
    relative: float


def read_run(path: Path) -> dict[int, dict[str, float]]:
    """Figures of each step by its number.

    Raises:
        ValueError: if the file holds no steps, or a step without loss and gradient norm.
    """
    path = path / "metrics.jsonl" if path.is_dir() else path
    text = path.read_text()
    rows = (
        json.loads(text)
        if path.suffix == ".json"
        else [json.loads(line) for line in text.splitlines()]
    )
    steps = {}
    for row in rows:
        if "valid_loss" in row:
            continue
        missing = [name for name in ("iteration", *FIELDS) if name not in row]
        if missing:
            raise ValueError(f"{path}: a step without {', '.join(missing)}: {row}")
        steps[int(row["iteration"])] = row
    if not steps:
        raise ValueError(f"{path}: no steps")
    return steps


def compare(
    first: dict[int, dict[str, float]], second: dict[int, dict[str, float]]
) -> list[Difference]:
    """The largest relative difference of each field over the steps that both runs have."""
    shared = sorted(first.keys() & second.keys())
    return [
        max(
            (
                Difference(
                    field=field,
                    iteration=step,
                    first=first[step][field],
                    second=second[step][field],
                    relative=_relative(first[step][field], second[step][field]),
                )
                for step in shared
            ),
            key=lambda difference: difference.relative,
        )
        for field in FIELDS
        if shared
    ]


def _relative(x: float, y: float) -> float:
    return 0.0 if x == y else abs(x - y) / max(abs(x), abs(y))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison; 0 where both runs agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument(
        "--rtol", type=float, default=1e-5, help="largest relative difference that counts as equal"
    )
    args = parser.parse_args(argv)
    first, second = read_run(args.first), read_run(args.second)
    agree = True
    for name, one, other in ((args.first, first, second), (args.second, second, first)):
        alone = sorted(one.keys() - other.keys())
        if alone:
            agree = False
            print(f"only in {name}: {len(alone)} steps, {alone[0]} to {alone[-1]}")
    for worst in compare(first, second):
        ok = worst.relative <= args.rtol
        agree = agree and ok
        print(
            f"{worst.field:10s} largest relative difference {worst.relative:.2e} at step"
            f" {worst.iteration} ({worst.first:.8g} against {worst.second:.8g}):"
            f" {'ok' if ok else f'above {args.rtol:g}'}"
        )
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
