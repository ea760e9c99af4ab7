"""`vico doctor`: what is installed and usable on this machine, and what falls back to what."""

import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_vico.cli.command_line import read
from megatron_vico.config.gpus import compiler_trouble

REQUIRED = (
    *("torch", "megatron-core", "transformers", "safetensors", "sentencepiece", "webdataset"),
    *("numpy", "pillow", "PyYAML", "tqdm", "tensorboard", "matplotlib", "psutil"),
)
DEMO = ("scikit-image", "scikit-learn")

_NO_GPU = "no GPU: the CPU stand-in and gloo are used"
_CLIPPING = "multi_tensor_scale_tensor"
"""What megatron-core clips gradients with; without it, it takes none of TransformerEngine's."""

State = Literal["ok", "absent", "missing", "broken"]


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Say what is installed and usable on this machine, and what falls back to what."""

    gpus: int = 0
    """Exit status 1 unless so many are usable, with NCCL."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    state: State
    """Usable; absent, with something to fall back to; missing, and nothing works without it; or
    broken, and nothing works with it."""
    version: str = ""
    note: str = ""
    """What follows from it."""


def main(arguments: Sequence[str]) -> int:
    """Print the report; exit status 1 if something required is missing."""
    gpus = read(Flags, arguments, prog="vico doctor").gpus
    found = findings()
    for finding in found:
        print(f"{finding.state:8} {finding.name:20} {finding.version:12} {finding.note}".rstrip())
    missing = [finding.name for finding in found if finding.state == "missing"]
    if missing:
        fix = "run `make venv`, or pip install -c constraints.txt -e ."
        print(f"\nmissing: {', '.join(missing)}; {fix}")
    broken = [finding.name for finding in found if finding.state == "broken"]
    if broken:
        print(f"\nbroken: {', '.join(broken)}; see its line above")
    lacking = missing or broken or _lacking(found, gpus)
    if lacking and not missing and not broken:
        print(f"\n{platform.node()} lacks: {'; '.join(lacking)} (--gpus {gpus})")
    return 1 if lacking else 0


def _lacking(found: Sequence[Finding], gpus: int) -> list[str]:
    """What this node needs beyond packages where so many ranks of it compute on GPUs."""
    import torch

    if gpus == 0:
        return []
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    absent = [each.name for each in found if each.name == "NCCL" and each.state != "ok"]
    return [*([f"{usable} usable GPUs, expected {gpus}"] if usable < gpus else []), *absent]


def findings() -> list[Finding]:
    """Everything the project can use, looked up on this machine; megatron is not imported."""
    usable = sys.version_info >= (3, 12)
    needed = "" if usable else "3.12 or newer is needed"
    python = Finding("python", "ok" if usable else "missing", platform.python_version(), needed)
    packages = [_package(name) for name in REQUIRED]
    if any(finding.name == "torch" and finding.state == "missing" for finding in packages):
        return [python, *packages]
    attention = "attention of TransformerEngine or torch"
    return [
        python,
        *packages,
        *_devices(),
        _transformer_engine(),
        _accelerator("flash-attn", module="flash_attn", fallback=attention),
        _apex(),
        *[_package(name, note="only the demo needs it", without="absent") for name in DEMO],
        _package("av", note="only videos need it", without="absent"),
    ]


def _package(name: str, *, note: str = "", without: State = "missing") -> Finding:
    version = _version(name)
    return Finding(name, without, note=note) if version is None else Finding(name, "ok", version)


def _devices() -> list[Finding]:
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        major, minor = torch.cuda.get_device_capability()
        gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        note = f"{gpus}, capability {major}.{minor}"
        cuda = Finding("CUDA", "ok", str(torch.version.cuda), note)
    else:
        cuda = Finding("CUDA", "absent", note=_NO_GPU)
    distributed = torch.distributed
    if on_gpu and distributed.is_available() and distributed.is_nccl_available():
        nccl = Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        nccl = Finding("NCCL", "absent", note="collectives go through gloo")
    has_gloo = distributed.is_available() and distributed.is_gloo_available()
    note = "" if on_gpu else "collectives of runs on the CPU"
    gloo = Finding("gloo", "ok" if has_gloo else "missing", note=note)
    return [cuda, nccl, gloo, *([_compiler()] if on_gpu else [])]


def _compiler() -> Finding:
    name, trouble = "C compiler", compiler_trouble()
    if trouble is None:
        return Finding(name, "ok")
    return Finding(name, "broken", note=f"{trouble}: Triton and torch.compile need it on a GPU")


def _transformer_engine() -> Finding:
    import torch

    from megatron_vico.cpu_stand_in import engine_trouble

    name = "transformer-engine"
    version = _version(name) or ""
    trouble = engine_trouble()
    fallback = "megatron-core's local layers with torch's attention; no FP8"
    if trouble is not None and trouble.is_fatal:
        note = (
            f"cannot be imported ({trouble.reason}), and megatron-core not beside it: install one"
            f" built for torch {torch.__version__}, or remove it"
        )
        return Finding(name, "broken", version, note)
    if trouble is not None:
        note = f"cannot be imported ({trouble.reason}); falls back to {fallback}"
        return Finding(name, "absent", version, note)
    if importlib.util.find_spec("transformer_engine") is None:
        return Finding(name, "absent", note=f"falls back to {fallback}")
    if not torch.cuda.is_available():
        return Finding(name, "absent", version, f"needs a GPU; {fallback}")
    notes = ["used with --bf16 only"]
    if torch.cuda.get_device_capability() < (9, 0):
        notes.append("no FP8: needs capability 9.0 (Hopper)")
    if not hasattr(importlib.import_module("transformer_engine.pytorch.optimizers"), _CLIPPING):
        notes.append("before 2.14 gradients are clipped with a wait for each: take a newer one")
    return Finding(name, "ok", version, "; ".join(notes))


def _accelerator(name: str, *, module: str, fallback: str) -> Finding:
    """A package that counts only if it can be imported: one built for another torch cannot."""
    version = _version(name)
    if version is None:
        return Finding(name, "absent", note=f"falls back to {fallback}")
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        note = f"cannot be imported ({reason}); falls back to {fallback}"
        return Finding(name, "absent", version, note)
    return Finding(name, "ok", version)


def _apex() -> Finding:
    """NVIDIA's apex: the package index has an unrelated one, and NVIDIA's may lack its kernels."""
    fallback = "optimizers and norms fall back to TransformerEngine's or torch's"
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding("apex", "absent", note=fallback)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        note = f"another package of that name is installed; {fallback}"
        return Finding("apex", "absent", note=note)
    if importlib.util.find_spec("amp_C") is None:
        note = f"installed without its CUDA kernels (amp_C); {fallback}"
        return Finding("apex", "absent", note=note)
    return Finding("apex", "ok", _version("apex") or "")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
