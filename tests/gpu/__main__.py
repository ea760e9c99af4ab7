"""`python -m tests.gpu [CHECK ...]`: the checks for one GPU, a line each.

A check that fails does not stop the others; the exit status is 1 when one failed.
"""

import contextlib
import sys
import time
import traceback
from pathlib import Path

from megatron_vico import cpu_stand_in

cpu_stand_in.install()  # before megatron is imported; nothing where there is a GPU

import torch  # noqa: E402

from tests.gpu.checks import CHECKS  # noqa: E402
from tests.gpu.machine import Machine  # noqa: E402


def main(names: list[str]) -> int:
    """Run the named checks, or all."""
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        print(f"no such check: {', '.join(unknown)}; there are {', '.join(CHECKS)}")
        return 2
    failed = 0
    with Machine() as machine:
        for name in names or CHECKS:
            start = time.perf_counter()
            try:
                with contextlib.redirect_stdout(sys.stderr):  # what training logs
                    said = CHECKS[name](machine)
                result = "ok"
            except Exception as error:
                result, said = "FAIL", _shown(error)
                failed += 1
            torch.cuda.empty_cache()
            print(f"{result:4} {name:12} {said} [{time.perf_counter() - start:.0f} s]", flush=True)
    return 1 if failed else 0


def _shown(error: Exception) -> str:
    """The error and the way to it in one line."""
    frames = reversed(traceback.extract_tb(error.__traceback__)[-6:])
    way = " <- ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]} at {way}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
