"""A whole step on a GPU: time by phase, MFU, memory beside the dry run's, plain fine-tuning.

Packs are those of benchmarks/step.py, whose clock this is: 75 % visual tokens, frozen ViT.
"""

import functools
import gc
import os
import statistics
import subprocess
import sys

import torch

from benchmarks.runs import build_run, make_batch
from benchmarks.step import time_step
from megatron_vico.config.gpus import peak_tflops
from megatron_vico.models.build import transformer_engine_usable
from megatron_vico.training.flops import step_flops
from megatron_vico.training.trainer import compute_gradients
from tests.gpu.machine import Figures, Machine
from tests.gpu.predicted import run_of

STEPS = 3
SFT, VICO = ("--stage", "pretrain"), ("--stage", "consistency")
FP8 = ("--fp8-format", "hybrid")
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()


def step_8b_width(machine: Machine) -> Figures:
    """Four layers of 8B's width: fine-tuning, ViCO, and ViCO in FP8."""
    size = ("internvl3_5-8b", 4) if machine.on_gpu else ("toy", 0)
    found = machine.found
    found |= _named("ViCO", vico := _step(machine, *size, VICO))
    found |= _named("SFT", sft := _step(machine, *size, SFT))
    found["ViCO ms over SFT's"] = float(vico["ms"]) / float(sft["ms"])
    if transformer_engine_usable():
        found |= _named("FP8 ViCO", fp8 := _step(machine, *size, (*VICO, *FP8)))
        found["bf16 ms over FP8's"] = float(vico["ms"]) / float(fp8["ms"])
    found |= _named("ViCO", _predicted(*size, VICO))
    return found


def step_small_sizes(machine: Machine) -> Figures:
    """1B and 2B with all their layers, 2B with full recompute."""
    found = machine.found
    sizes = (("internvl3_5-1b", ()), ("internvl3_5-2b", FULL)) if machine.on_gpu else (("toy", ()),)
    for size, flags in sizes:
        found |= _named(size, _step(machine, size, 0, (*VICO, *flags)))
        found |= _named(size, _predicted(size, 0, (*VICO, *flags)))
    return found


def _step(machine: Machine, size: str, num_layers: int, flags: tuple[str, ...]) -> Figures:
    """Medians of a few steps after one that may compile."""
    cfg, model = run_of(num_layers, _flags(size, flags))
    run = build_run(cfg, model, machine.groups)
    timed, flops = [], 0.0
    for step in range(1 + (STEPS if machine.on_gpu else 1)):
        batch = make_batch(
            cfg,
            model=model,
            stage=cfg.stage.stage,
            step=0,
            num_packs=1,
            pack_tokens=cfg.data.seq_length,
            groups=machine.groups,
        )
        flops = sum(step_flops(model, cfg.stage, pack) for pack in batch.packs)
        if step == 1:
            torch.cuda.reset_peak_memory_stats()
        timed.append(time_step(run, batch))
    assert all(param.isfinite().all() for param in run.policy.head.parameters())
    seconds = statistics.median(each.time_s for each in timed[1:])
    found: Figures = {"ms": 1e3 * seconds, "TFLOP/s": flops / seconds / 1e12}
    for phase in timed[-1].phases_s:
        found[f"{phase} ms"] = 1e3 * statistics.median(each.phases_s[phase] for each in timed[1:])
    # Until all is queued that gives the gradients.
    found["host waits before the norm"] = machine.host_waits(
        functools.partial(compute_gradients, run, batch)
    )
    if machine.on_gpu:
        found["GB at most"] = torch.cuda.max_memory_allocated() / 1e9
        if peak := peak_tflops(torch.cuda.get_device_name()):
            found["MFU"] = float(found["TFLOP/s"]) / peak
    del run, batch
    gc.collect()
    torch.cuda.empty_cache()
    return found


def _predicted(size: str, num_layers: int, flags: tuple[str, ...]) -> Figures:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.predicted", str(num_layers), *_flags(size, flags)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-500:]
    return {"GB by the dry run": int(done.stdout.split()[-1]) / 1e9}


def _flags(size: str, flags: tuple[str, ...]) -> list[str]:
    tokens = "1024" if size == "toy" else "32768"
    return ["--model-size", size, "--bf16", "--seq-length", tokens, *flags]


def _named(name: str, figures: Figures) -> Figures:
    return {f"{name} {what}": value for what, value in figures.items()}
