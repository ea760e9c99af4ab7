"""`python -m tests.gpu.one CHECK REPORT`: one check in this process; its result is a JSON file."""

import importlib
import json
import signal
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.gpu.machine import Figures, Machine

PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine")
STEP_CHECKS = ("step_8b_width", "step_small_sizes")
FILES = {"kl_head": "kl_check", "answers": "answers_check"}
FILES |= dict.fromkeys(STEP_CHECKS, "step_check")
"""Of the checks that are not in checks.py."""


def check_named(name: str) -> "Callable[[Machine], Figures]":
    """A check; only its own file is imported, for others may need what is not here."""
    module = importlib.import_module(f"tests.gpu.{FILES.get(name, 'checks')}")
    check: Callable[[Machine], Figures] = getattr(module, name)
    return check


def report_of(name: str) -> dict[str, Any]:
    """Run a check: its figures, or why it failed and where."""
    report: dict[str, Any] = {"versions": {each: _version(each) for each in PACKAGES}}
    try:
        from megatron_vico import cpu_stand_in

        cpu_stand_in.install()  # before megatron is imported; nothing where there is a GPU
        check = check_named(name)
        from tests.gpu.machine import Machine

        with Machine() as machine:
            report["figures"] = machine.found
            return report | {"result": "ok", "figures": check(machine)}
    except KeyboardInterrupt:  # of SIGTERM: who sent it says why
        return report | {"result": "hangs"}
    except ModuleNotFoundError as error:
        said = f"there is no module {error.name}: put its wheel into the folder of --packages"
        return report | {"result": "lacks", "said": said}
    except Exception as error:
        traceback.print_exc()
        frames = reversed(traceback.extract_tb(error.__traceback__)[-6:])
        way = " <- ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:500]} at {way}"
        return report | {"result": "FAIL", "said": said}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    Path(sys.argv[2]).write_text(json.dumps(report_of(sys.argv[1])))
