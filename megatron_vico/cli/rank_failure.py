"""How one of many ranks ends when it fails: at once, with its number and the cause.

Left to itself a failing rank can wait forever: closing NCCL's process groups waits for collectives
that the other ranks never join, and so do destructors at the interpreter's end. The launcher ends
the others once it sees one process gone.
"""

import os
import sys
import time
import traceback
from typing import NoReturn

from megatron_vico.errors import USER_ERRORS

PEER_GRACE_S = 3.0
"""What a rank waits that failed in a collective: the launcher names the first process to end as the
root cause, and the rank that made the collective fail must be it."""


def is_one_of_many() -> bool:
    """Whether a launcher (torchrun, srun) started this process as one of several ranks."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def end_rank(error: Exception, *, status: int) -> NoReturn:
    """Say what went wrong on this rank, tell torchrun, and end the process without any clean-up.

    To be called where the error was caught: the traceback that torchrun shows is that of the
    exception in flight. The exit status is not 0.
    """
    from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

    if _is_of_a_collective(error):
        time.sleep(PEER_GRACE_S)
    if isinstance(error, USER_ERRORS):
        lines = [f"{type(error).__name__}: {error}"]
    elif _is_of_a_collective(error):
        # Every other rank fails so; 50 lines from each, which torchrun shows, would bury the cause.
        lines = traceback.format_exception_only(error)[0].splitlines()[:1]
    else:
        lines = "".join(traceback.format_exception(error)).splitlines()
    rank = os.environ.get("RANK", "?")
    print("\n".join(f"rank {rank}: {line}" for line in lines), file=sys.stderr)
    ErrorHandler().record_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _is_of_a_collective(error: Exception) -> bool:
    """Whether another rank's end, or its silence, is what this rank noticed."""
    import torch

    # Gloo's errors are plain RuntimeErrors that begin with a line of its source.
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)
