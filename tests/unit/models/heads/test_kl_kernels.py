"""The Triton kernels of the KL head: right in Triton's interpreter, small enough for an H100, and
taken where they can run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kl_floor import KERNELS, compiled
from megatron_vico.models.heads import kl, kl_blocks, kl_kernels

ROOT = Path(__file__).parents[4]


@pytest.mark.slow
def test_in_tritons_interpreter() -> None:
    """`interpreted_kernels.py`, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, "tests/unit/models/heads/interpreted_kernels.py"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert re.search(r"\b34 passed", run.stdout), run.stdout[-500:]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("aligned", [True, False], ids=["vocabulary of 16 n", "odd vocabulary"])
def test_they_fit_an_h100(
    name: str, aligned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled for sm_90. Measured: 54 registers for the statistics, 32 for the gradient, 1 KB of
    shared memory, which is the system's own; nothing spilled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = compiled(name, aligned=aligned)
    assert found.spilled_bytes == 0
    assert found.shared_bytes <= 2048
    # 65,536 registers a processor: four programs of eight warps, so a chunk of 512 rows at once.
    assert found.registers <= 64
    assert found.loads_of_16_bytes == aligned


def test_who_makes_the_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda, dtype = True, torch.float32

    logits = OnGpu()
    assert kl.passes_for(torch.zeros(1, 1)) is kl_blocks
    assert kl.passes_for(logits) is kl_kernels
    logits.dtype = torch.float64
    assert kl.passes_for(logits) is kl_blocks
    logits.dtype = torch.float32
    monkeypatch.setattr(kl.importlib.util, "find_spec", lambda name: None)
    assert kl.passes_for(logits) is kl_blocks
