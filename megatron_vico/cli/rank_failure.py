"""How one of many ranks ends when it fails: at once, with its number and the cause.

Left to itself a failing rank can wait forever: closing NCCL's process groups waits for collectives
that the other ranks never join, and so do destructors at the interpreter's end. The launcher ends
the others once it sees one process gone.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from megatron_vico.errors import USER_ERRORS, printable

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
    if _is_of_a_collective(error):
        time.sleep(PEER_GRACE_S)
    if isinstance(error, (*USER_ERRORS, OSError, MemoryError)) and not _is_of_a_collective(error):
        lines = [one_line(error)]
    elif _is_of_a_collective(error):
        # Every other rank fails so; 50 lines from each, which torchrun shows, would bury the cause.
        lines = traceback.format_exception_only(error)[0].splitlines()[:1]
    else:
        lines = "".join(traceback.format_exception(error)).splitlines()
    rank = os.environ.get("RANK", "?")
    print("\n".join(f"rank {rank}: {line}" for line in lines), file=sys.stderr)
    _tell_launcher("\n".join(lines))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def one_line(error: BaseException) -> str:
    """An error without its traceback; where it came from, if it is none of the project's own."""
    line = f"{type(error).__name__}: {printable(str(error))}"
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, USER_ERRORS) or not frames:
        return line
    return f"{line} (from {frames[-1].filename}:{frames[-1].lineno})"


def _tell_launcher(text: str) -> None:
    """torchrun prints this last, as the root cause; torch would have it print a traceback."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}
        message = {"message": text, "extraInfo": details}
        Path(path).write_text(json.dumps({"message": message}))


def _is_of_a_collective(error: Exception) -> bool:
    """Whether another rank's end, or its silence, is what this rank noticed."""
    if "torch" not in sys.modules:
        return False  # it has not come that far, and importing it takes seconds
    import torch

    # Gloo's errors are plain RuntimeErrors that begin with a line of its source.
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)
