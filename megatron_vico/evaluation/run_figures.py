"""What a run's metrics.jsonl comes to: its rows, and the figures of a steady step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vico.errors import ConfigError
from megatron_vico.files import read_json, read_json_lines, read_text, read_yaml

Row = dict[str, Any]

WARMING_UP = 0.1
"""The first part of the steps, at least two, that a median leaves out: caches, compilation."""


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """A run's folder as it is read again."""

    folder: Path
    steps: tuple[Row, ...]
    validation: tuple[Row, ...]
    damaged: tuple[int, ...]
    """Numbers of the lines that could not be read."""

    config_text: str
    config: Row
    plan: Row | None
    """What `vico plan --json` wrote to plan.json in the folder."""

    @property
    def world_size(self) -> int:
        """Ranks of the last step."""
        return int(self.steps[-1].get("world_size", 1))

    def values(self, name: str) -> list[float]:
        """Of a steady step: a figure of all steps but the first ones."""
        first = min(max(2, int(WARMING_UP * len(self.steps))), len(self.steps) - 1)
        return [row[name] for row in self.steps[first:] if isinstance(row.get(name), int | float)]

    def median(self, name: str) -> float | None:
        """None where the run has no such figure."""
        values = self.values(name)
        return float(np.median(values)) if values else None


def read_run(run: Path) -> RunFigures:
    """A run from its --save folder, or from its metrics.jsonl alone.

    Raises:
        ConfigError: if there is none, or it has no step.
    """
    folder = run if run.is_dir() else run.parent
    path = folder / "metrics.jsonl" if run.is_dir() else run
    try:
        rows, damaged = read_json_lines(path)
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; give the --save folder of a run, or its metrics.jsonl."
        ) from error
    rows = [row for row in rows if isinstance(row.get("iteration"), int)]
    steps = tuple(row for row in rows if "loss" in row)
    if not steps:
        raise ConfigError(f"{path}: no step in it ({len(damaged)} damaged lines); nothing to show.")
    config_text = _text(folder / "config.yaml")
    return RunFigures(
        folder=folder,
        steps=steps,
        validation=tuple(row for row in rows if "valid_loss" in row),
        damaged=tuple(damaged),
        config_text=config_text,
        config=read_yaml(folder / "config.yaml") if config_text else {},
        plan=_plan(folder / "plan.json"),
    )


def _text(path: Path) -> str:
    return read_text(path) if path.is_file() else ""


def _plan(path: Path) -> Row | None:
    if not path.is_file():
        return None
    plan = read_json(path)
    try:
        planned(plan)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ConfigError(
            f"{path} is not what `vico plan --json` writes ({error!r}); make it again."
        ) from error
    return plan


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What a plan says, as a run's figures can be compared with it."""

    world_size: int
    gpu: str
    peak_gb: float
    """Of the fullest rank."""

    tflop_per_gpu: float
    """Of a step, recomputation included; the mean of the ranks that were played."""

    expected_s: float | None
    """Of a step, by formula; None in a plan of an older version."""


def planned(plan: Row) -> Planned:
    """The plan's figures."""
    ranks: Sequence[Row] = list(plan["ranks"].values())
    return Planned(
        world_size=plan["world_size"],
        gpu=plan["gpu"],
        peak_gb=max(rank["peak_bytes"] for rank in ranks) / 1e9,
        tflop_per_gpu=float(np.mean([sum(rank["flops"].values()) for rank in ranks])) / 1e12,
        expected_s=plan.get("expected_s"),
    )
