"""What a GPU can do at most, by the words in its name, and what is needed to compile for it."""

import os
import shutil
import sysconfig
from pathlib import Path

PEAK_BF16_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "H800": 989,
    "H20": 148,
    "GH200": 989,
    "A100": 312,
    "A800": 312,
    "B200": 2250,
    "GB200": 2500,
    "L40S": 362,
}
"""Dense bf16 TFLOP/s, from NVIDIA's data sheets."""


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a device as `torch.cuda.get_device_name` has it; None: not known here."""
    known = [name for name in PEAK_BF16_TFLOPS if name.lower() in device_name.lower()]
    return PEAK_BF16_TFLOPS[max(known, key=len)] if known else None


def compiler_trouble() -> str | None:
    """Why nothing could be compiled for a GPU here: Triton builds a C module before its kernels."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "no C compiler is found; install gcc"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else f"{header} is not there; install Python's headers"
