"""The language model split over tensor-parallel ranks equals the whole one: logits and every gradient."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_two_tensor_parallel_ranks_with_and_without_sequence_parallelism_equal_one_process() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            str(ROOT / "tests/distributed/language_model_layouts.py"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("ERRORS")]
    assert [tuple(line[:2]) for line in lines] == [
        (name, sequence_parallel) for name in ("toy", "toy-6b") for sequence_parallel in ("False", "True")
    ]
    for line in lines:
        logits, leaf, weights = map(float, line[2:])
        assert logits < 1e-5, line  # measured 6e-7
        assert leaf < 1e-5, line  # measured 1.5e-6
        assert weights < 1e-5, line  # measured 1.7e-6
