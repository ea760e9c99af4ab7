"""The stand-in: installed by entry points and fixtures only, absent on a GPU, complete enough."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return done.stdout.strip()


@pytest.mark.slow
def test_nothing_is_patched_where_cuda_is_available() -> None:
    code = """
import torch
torch.cuda.is_available = lambda: True
before = (torch.empty, torch.Tensor.to, torch.compile, torch.cuda.current_device,
    torch.distributed.all_to_all_single)
from megatron_vico import cpu_stand_in
cpu_stand_in.install()
after = (torch.empty, torch.Tensor.to, torch.compile, torch.cuda.current_device,
    torch.distributed.all_to_all_single)
print(all(x is y for x, y in zip(before, after)), hasattr(torch.cuda, "_vico_stand_in"))
"""
    assert run_python(code) == "True False"


@pytest.mark.slow
def test_importing_the_package_installs_nothing() -> None:
    code = """
import torch
before = torch.empty
import megatron_vico, megatron_vico.cpu_stand_in
import megatron_vico.vico.routing, megatron_vico.config.schema
print(torch.empty is before, hasattr(torch.cuda, "_vico_stand_in"))
"""
    assert run_python(code) == "True False"


def test_cuda_means_cpu() -> None:
    assert torch.empty(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2, device=0).device.type == "cpu"
    assert torch.ones(1).to("cuda:0").cuda().device.type == "cpu"
    assert torch.ones(1).new_empty(3, device="cuda").device.type == "cpu"
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1, pin_memory=True).pin_memory().device.type == "cpu"
    assert torch.cuda.current_device() == 0
    assert not torch.cuda.is_available()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.Event().record()


def test_rng_is_the_cpu_generator() -> None:
    torch.cuda.manual_seed(7)
    first = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(first, torch.rand(3))
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.rand(3))


def test_cpu_adam_equals_torch_adamw() -> None:
    from megatron_vico.cpu_stand_in import CPUAdam

    torch.manual_seed(0)
    mine, theirs = (torch.nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    options = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, upstream = CPUAdam([mine], **options), torch.optim.AdamW([theirs], **options)
    for _ in range(5):
        mine.grad = torch.randn(5, 3)
        theirs.grad = mine.grad.clone()
        ours.step()
        upstream.step()
    assert torch.equal(mine, theirs)
    assert ours.param_groups[0]["step"] == 5
    assert "step" not in ours.state[mine]
