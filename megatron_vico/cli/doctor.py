"""`vico doctor`: what is installed and usable on this machine, and what falls back to what."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

REQUIRED = (
    *(
        "torch",
        "megatron-core",
        "transformers",
        "safetensors",
        "sentencepiece",
        "webdataset",
        "numpy",
        "pillow",
    ),
    *("PyYAML", "tqdm", "tensorboard", "matplotlib", "psutil"),
)
DEMO = ("scikit-image", "scikit-learn")

_NO_GPU = "no GPU: the CPU stand-in and gloo are used"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    state: Literal["ok", "absent", "missing"]
    """Usable; absent, with something to fall back to; or missing, and nothing works without it."""
    version: str = ""
    note: str = ""
    """What follows from it."""


def main(arguments: Sequence[str]) -> int:
    """Print the report.

    Args:
        arguments: the words after `doctor`.

    Returns:
        Exit status: 1 if something required is missing.
    """
    argparse.ArgumentParser(prog="vico doctor", description=__doc__).parse_args(arguments)
    found = findings()
    for finding in found:
        print(f"{finding.state:8} {finding.name:20} {finding.version:12} {finding.note}".rstrip())
    missing = [finding.name for finding in found if finding.state == "missing"]
    if missing:
        print(
            f"\nmissing: {', '.join(missing)}; run `make venv`, or pip install -c constraints.txt"
            " -e ."
        )
    return 1 if missing else 0


def findings() -> list[Finding]:
    """Everything the project can use, looked up on this machine; megatron is not imported."""
    python = Finding(
        name="python",
        state="ok" if sys.version_info >= (3, 12) else "missing",
        version=platform.python_version(),
        note="" if sys.version_info >= (3, 12) else "3.12 or newer is needed",
    )
    packages = [_package(name) for name in REQUIRED]
    if any(finding.name == "torch" and finding.state == "missing" for finding in packages):
        return [python, *packages]
    return [
        python,
        *packages,
        *_devices(),
        _transformer_engine(),
        _accelerator(
            "flash-attn", module="flash_attn", fallback="attention of TransformerEngine or torch"
        ),
        _apex(),
        *[_package(name, note="only the demo needs it", optional=True) for name in DEMO],
        _package("av", note="only videos need it", optional=True),
    ]


def _package(name: str, *, note: str = "", optional: bool = False) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name=name, state="absent" if optional else "missing", note=note)
    return Finding(name=name, state="ok", version=version)


def _devices() -> list[Finding]:
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        major, minor = torch.cuda.get_device_capability()
        names = (
            f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, capability"
            f" {major}.{minor}"
        )
        cuda = Finding(name="CUDA", state="ok", version=str(torch.version.cuda), note=names)
    else:
        cuda = Finding(name="CUDA", state="absent", note=_NO_GPU)
    distributed = torch.distributed
    has_nccl = on_gpu and distributed.is_available() and distributed.is_nccl_available()
    has_gloo = distributed.is_available() and distributed.is_gloo_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else ""
    return [
        cuda,
        Finding(
            name="NCCL",
            state="ok" if has_nccl else "absent",
            version=nccl,
            note="" if has_nccl else "collectives go through gloo",
        ),
        Finding(
            name="gloo",
            state="ok" if has_gloo else "missing",
            note="" if on_gpu else "collectives of runs on the CPU",
        ),
    ]


def _transformer_engine() -> Finding:
    import torch

    name = "transformer-engine"
    fallback = "megatron-core's local layers with torch's attention; no FP8"
    if not torch.cuda.is_available():
        return Finding(
            name=name, state="absent", version=_version(name) or "", note=f"needs a GPU; {fallback}"
        )
    finding = _accelerator(name, module="transformer_engine.pytorch", fallback=fallback)
    if finding.state == "ok" and torch.cuda.get_device_capability() < (9, 0):
        return Finding(
            name=name,
            state="ok",
            version=finding.version,
            note="no FP8: needs capability 9.0 (Hopper)",
        )
    return finding


def _accelerator(name: str, *, module: str, fallback: str) -> Finding:
    """A package that counts only if it can be imported: one built for another torch cannot."""
    version = _version(name)
    if version is None:
        return Finding(name=name, state="absent", note=f"falls back to {fallback}")
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Finding(
            name=name,
            state="absent",
            version=version,
            note=f"cannot be imported ({reason}); falls back to {fallback}",
        )
    return Finding(name=name, state="ok", version=version)


def _apex() -> Finding:
    """NVIDIA's apex; the package index has an unrelated one of that name, and even NVIDIA's may
    lack its kernels."""
    fallback = "optimizers and norms fall back to TransformerEngine's or torch's"
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding(name="apex", state="absent", note=fallback)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        return Finding(
            name="apex",
            state="absent",
            note=f"another package of that name is installed; {fallback}",
        )
    if importlib.util.find_spec("amp_C") is None:
        return Finding(
            name="apex",
            state="absent",
            note=f"installed without its CUDA kernels (amp_C); {fallback}",
        )
    return Finding(name="apex", state="ok", version=_version("apex") or "")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
