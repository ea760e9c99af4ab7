"""Writes the golden values: losses and gradient norms of ten steps of each toy stage.

Run: python -m tests.golden.update FOLDER (FOLDER: tests/golden, or elsewhere to compare with
tools/compare_runs.py)

A change that moves them explains why in its commit.
"""

import json
import sys
import tempfile
from pathlib import Path

from megatron_vico import cpu_stand_in
from tests.training_runs import ToyData, make_toy_data, read_metrics, toy_config

STAGES = ("pretrain", "warmup", "consistency", "router")
FIELDS = ("iteration", "loss", "grad_norm")


def golden_steps(data: ToyData, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Ten steps of each stage, each starting from the one before; stage name to steps."""
    from megatron_vico.training.trainer import train

    steps = {}
    for number, stage in enumerate(STAGES):
        before = {"pretrained_checkpoint": str(folder / STAGES[number - 1])} if number else {}
        reference = {"reference_load": str(folder / "pretrain")} if number else {}
        train(toy_config(data, stage, save=str(folder / stage), **before, **reference))
        steps[stage] = [
            {name: row[name] for name in FIELDS} for row in read_metrics(folder / stage)
        ]
    return steps


def main() -> None:
    """Write one JSON file a stage."""
    cpu_stand_in.install()
    import torch

    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data = make_toy_data(Path(folder) / "data")
        for stage, steps in golden_steps(data, Path(folder)).items():
            lines = ",\n".join(f"  {json.dumps(step)}" for step in steps)
            (target / f"{stage}.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
