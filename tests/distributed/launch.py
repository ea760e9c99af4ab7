"""Starts a script of this folder on several ranks, as torchrun does, and hands back what it
printed."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def launch(script: str, *words: str | Path, num_processes: int, timeout_s: int = 300) -> str:
    """Run a script on gloo ranks of this machine, a core's thread each.

    Args:
        script: its name.
        words: its arguments.
        num_processes: ranks.
        timeout_s: after which it counts as hanging.

    Returns:
        What all ranks wrote to stdout; fails with the end of their output if one of them failed.
    """
    done = start(script, *words, num_processes=num_processes, timeout_s=timeout_s)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def start(
    script: str, *words: str | Path, num_processes: int, timeout_s: int
) -> subprocess.CompletedProcess[str]:
    """As `launch`, but a rank may fail."""
    torchrun = (sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone")
    return subprocess.run(
        [*torchrun, "--nproc-per-node", str(num_processes), str(HERE / script), *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(),
        timeout=timeout_s,
        check=False,
    )


def environment() -> dict[str, str]:
    """Of a script of this folder."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
