"""The language model split over context-parallel ranks equals the whole one: outputs and every gradient."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DENSE = ("toy", "toy-6b")


def test_context_parallel_ranks_equal_one_process_also_under_tensor_parallelism() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"),
            str(ROOT / "tests/distributed/context_parallel_ranks.py"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    errors = {tuple(line[1:3]): line[3:] for line in lines if line[:1] == ["ERRORS"]}
    recomputed = {line[1]: line[3:] for line in lines if line[:1] == ["RECOMPUTE"]}
    controls = {line[1]: line[3:] for line in lines if line[:1] == ["CONTROL"]}
    layouts = ("TP2+SPxCP2", "TP2xCP2", "CP4", "CP2xDP2")
    assert errors.keys() == {(layout, name) for layout in layouts for name in DENSE} | {("CP2xDP2", "toy-moe")}
    assert controls.keys() == set(layouts)
    assert recomputed.keys() == set(layouts)
    for each, values in (*errors.items(), *recomputed.items()):
        rows, leaf, weights = map(float, values)
        assert rows < 1e-5, each  # measured 1.2e-6
        assert leaf < 1e-5, each  # measured 1.4e-6
        assert weights < 1e-5, each  # measured 1.8e-6
    for layout, values in controls.items():  # right values, wrong gradients
        rows, leaf, weights = map(float, values)
        assert rows < 1e-5, layout
        assert leaf > 1e-2, layout  # measured 0.8
        assert weights > 1e-2, layout  # measured 0.9
