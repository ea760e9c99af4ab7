"""`python -m tests.gpu.one CHECK REPORT`: one check in this process; its result is a JSON file."""

import json
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_vico import cpu_stand_in

cpu_stand_in.install()  # before megatron is imported; nothing where there is a GPU

from tests.gpu.checks import CHECKS  # noqa: E402
from tests.gpu.machine import Machine  # noqa: E402

PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine")


def report_of(name: str) -> dict[str, Any]:
    """Run a check: its figures, or why it failed and where."""
    report: dict[str, Any] = {"versions": {each: _version(each) for each in PACKAGES}}
    try:
        with Machine() as machine:
            return report | {"result": "ok", "figures": CHECKS[name](machine)}
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
    Path(sys.argv[2]).write_text(json.dumps(report_of(sys.argv[1])))
