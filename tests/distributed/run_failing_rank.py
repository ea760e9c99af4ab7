"""`vico train` on a rank that fails, is killed, or is told to stop, at its second step; started by
torchrun.

Usage: run_failing_rank.py HOW FLAG..., where HOW is raise, raise-all (on every rank), kill or stop,
and the flags are those of `vico train`.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

FAILING_RANK = 1


def main() -> int:
    """Hooks the loader, which every stage has, and runs the command as a user would."""
    from megatron_vico import cpu_stand_in
    from megatron_vico.cli.main import main as vico

    cpu_stand_in.install()
    import torch

    from megatron_vico.data.load.loader import Loader

    torch.set_num_threads(1)
    how, *flags = sys.argv[1:]
    steps = Loader.__iter__

    def with_failure(loader: Loader) -> Iterator[Any]:
        for number, batches in enumerate(steps(loader)):
            if number == 1 and (how == "raise-all" or torch.distributed.get_rank() == FAILING_RANK):
                fail(how)
            yield batches

    Loader.__iter__ = with_failure  # type: ignore[method-assign]
    return vico(["train", *flags])


def fail(how: str) -> None:
    """What happens to the failing rank; the other one goes on to the step's collectives and waits
    there."""
    if how.startswith("raise"):
        raise ArithmeticError("the cause of it all")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    # To the rank and its loader's workers (torchrun gives each rank a process group of its own), as
    # Slurm does; from another process, since a worker takes its parent's SIGTERM for the usual end.
    subprocess.run(["kill", "-TERM", "--", f"-{os.getpgrp()}"], start_new_session=True, check=True)


if __name__ == "__main__":
    sys.exit(main())
