"""Each shipped recipe fits on the GPUs that its first line names: its real step, in plans of few
packs of the first, a middle and the last pipeline stage. `make test-plan`; the smallest is in `make
test` too (tests/unit/planning)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training_runs import load_tool

ROOT = Path(__file__).parents[1]
TOOL = load_tool("plan_table")
OWN = {case.name: case for case in TOOL.all_cases() if case == TOOL.made_for(case.recipe)}


def assert_fits(name: str, folder: Path) -> None:
    """Plan it, and read what the command wrote."""
    case, file = OWN[name], folder / "plan.json"
    done = subprocess.run(
        [sys.executable, "-m", "megatron_vico", *case.words, "--json", file],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-400:]}{done.stderr[-2000:]}"
    plan = json.loads(file.read_text())
    assert (plan["gpu"], plan["world_size"]) == (case.kind, case.gpus)
    peaks = [rank["peak_bytes"] for rank in plan["ranks"].values()]
    assert 0 < max(peaks) <= plan["room_bytes"]


@pytest.mark.parametrize("name", OWN)
def test_a_recipe_fits(name: str, tmp_path: Path) -> None:
    assert_fits(name, tmp_path)
