"""Runs a function on several gloo ranks of this machine, or a script as torchrun does."""

import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import start_processes

ROOT = Path(__file__).parents[2]

# 4 s of CPU a rank otherwise, and as many again for what torch imports in its first step.
PRELOADED = "tests.distributed.preloaded"


def on_ranks[R](
    function: Callable[..., R],
    *args: Any,
    num_ranks: int,
    timeout_s: float = 900,
    preloaded: str = PRELOADED,
) -> list[R]:
    """Call a function of a module on gloo ranks, a thread each, as torchrun would: in processes of
    their own, with torch.distributed running and `preloaded` imported (one module for all launches
    of a process). What it returned, by rank; raises with the traceback of a rank that failed."""
    preloading(preloaded)
    with tempfile.TemporaryDirectory() as folder:
        ranks = start_processes(
            _rank,
            args=(num_ranks, folder, function, args),
            nprocs=num_ranks,
            join=False,
            start_method="forkserver",
        )
        end = time.monotonic() + timeout_s
        try:
            while not ranks.join(timeout=max(0.0, end - time.monotonic())):
                assert time.monotonic() < end, f"ranks hang after {timeout_s} s"
        finally:
            for process in ranks.processes:
                process.kill()
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(num_ranks)
        ]


def preloading(module: str = PRELOADED) -> ForkServerContext:
    """What starts processes with a module imported, the same for all of a process."""
    os.environ["PYTHONPATH"] = str(ROOT)  # Python 3.12's fork server is told no other path
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def _rank(
    rank: int, num_ranks: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # megatron-core collects garbage with each checkpoint: 0.2 s among all modules
    multiprocessing.set_start_method("fork", force=True)  # for what a rank starts: Linux' own
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=num_ranks
    )
    torch.save(function(*args), Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # dozens of process groups take a minute to close


def torchrun(
    script: str | Path, *words: str | Path, num_processes: int, timeout_s: int = 120
) -> subprocess.CompletedProcess[str]:
    """Run a script, by its path from the root, as a user would; its ranks may fail."""
    launcher = (sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone")
    return subprocess.run(
        [*launcher, "--nproc-per-node", str(num_processes), str(script), *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=timeout_s,
        check=False,
    )
