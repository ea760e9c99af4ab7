#!/usr/bin/env python3
"""Time and peak memory of the fused KL head, of the textbook formula and of Liger's kernel.

    python benchmarks/kl_head.py --json runs/kl_head.json
    python benchmarks/kl_head.py --shapes 8192x4096x151936 32768x4096x151936 --dtype bf16

One pass is the loss, the gradient of the policy's rows and that of its head: ours adds the latter
to a float32 `main_grad`, as training does, the others return it. Peak memory is what a pass
allocates above its inputs; the gradients are part of it and have a column of their own. Ratios are
to ours in the same run. "-" stands for what did not fit into memory or is not installed; more than
`--skip-above` GB by estimate is not tried. On the CPU, time is CPU time of one core, so that other
work on the machine does not count, and memory is counted from what torch allocates, without the
scratch memory inside an operator.

The textbook formula is the one that the tests compare with. Liger's
`LigerFusedLinearJSD(jsd_beta=0)` is KL(teacher || student) as a mean over rows; it needs a GPU.
Neither it nor any GPU row has been run by the authors of this file.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

# Run as a script, only this folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vico.models.heads.vocabulary import VocabularyShard
from tests.peak_bytes import PeakBytes
from tests.unit.models.heads.kl_heads import (
    Heads,
    make_heads,
    naive_kl_loss,
    ours,
    with_main_grad,
)

CPU_SHAPES = ((256, 256, 32768), (1024, 256, 32768), (4096, 256, 32768))
GPU_SHAPES = tuple((num_rows, 4096, 151936) for num_rows in (1024, 4096, 8192, 32768))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Shape = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of the table."""

    name: str
    num_rows: int
    hidden: int
    vocab_size: int
    device: str
    dtype: str
    time_s: float | None
    """Least over the passes; None: not run."""

    peak_bytes: int | None
    """Above the inputs, gradients included."""

    gradient_bytes: int
    """What of the peak is gradients that are handed back; a `main_grad` is an input."""

    note: str = ""


def liger(heads: Heads) -> Tensor:
    """Liger's fused linear JSD at beta 0; a mean over rows, so ours for row weights of 1 / rows."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss: Tensor = LigerFusedLinearJSD(jsd_beta=0.0)(
        heads.policy_rows_RH,
        heads.policy_weight_VH,
        heads.reference_rows_RH,
        heads.reference_weight_VH,
        None,
    )
    return loss


def one_pass(step: Callable[[Heads], Tensor], heads: Heads) -> None:
    """Loss and both gradients, which are dropped."""
    step(heads).backward()
    heads.policy_rows_RH.grad = None
    heads.policy_weight_VH.grad = None


def seconds(step: Callable[[Heads], Tensor], heads: Heads, repeats: int) -> float:
    """Least time of a pass, after one that warms up; on the CPU, time of the process."""
    on_gpu = heads.policy_rows_RH.is_cuda
    clock = time.perf_counter if on_gpu else time.process_time
    times = []
    for _ in range(repeats + 1):
        if on_gpu:
            torch.cuda.synchronize()
        start = clock()
        one_pass(step, heads)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(clock() - start)
    return min(times[1:])


def peak_bytes(step: Callable[[Heads], Tensor], heads: Heads) -> int:
    """The largest number of bytes that one pass holds at one time."""
    if heads.policy_rows_RH.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        one_pass(step, heads)
        return int(torch.cuda.max_memory_allocated()) - before
    with PeakBytes(*heads.tensors()) as seen:
        one_pass(step, heads)
    return seen.peak


def measure_shape(shape: Shape, options: argparse.Namespace) -> list[Measured]:
    """Ours, the textbook's and Liger's on the same inputs."""
    num_rows, hidden, vocab_size = shape
    dtype, device = DTYPES[options.dtype], torch.device(options.device)
    heads = make_heads(num_rows, hidden, vocab_size, mean_kl=1e-2, dtype=dtype).to(device)
    heads = replace(heads, row_weight_R=torch.full((num_rows,), 1 / num_rows, device=device))
    gradients = (heads.policy_rows_RH, heads.policy_weight_VH)
    gradient_bytes = sum(each.numel() * each.element_size() for each in gradients)

    def row(
        name: str, step: Callable[[Heads], Tensor], inputs: Heads, *, note: str = ""
    ) -> Measured:
        time_s = peak = None
        if not note:
            try:
                time_s, peak = seconds(step, inputs, options.repeats), peak_bytes(step, inputs)
            except torch.OutOfMemoryError:
                note = "out of memory"
                torch.cuda.empty_cache()
        return Measured(
            name=name,
            num_rows=num_rows,
            hidden=hidden,
            vocab_size=vocab_size,
            device=device.type,
            dtype=options.dtype,
            time_s=time_s,
            peak_bytes=peak,
            gradient_bytes=gradient_bytes,
            note=note,
        )

    # Both models' logits, their float32 forms and what autograd keeps: 28 bytes and more an entry.
    too_large = num_rows * vocab_size * 28 > options.skip_above * 1e9
    return [
        row("ours", lambda h: ours(h, options.chunk_rows), with_main_grad(heads)),
        row(
            "textbook",
            naive_kl_loss,
            heads,
            note=f"over {options.skip_above:g} GB by estimate" if too_large else "",
        ),
        row("liger", liger, heads, note=why_no_liger(device)),
    ]


def why_no_liger(device: torch.device) -> str:
    """Why Liger's kernel cannot be run here; empty if it can."""
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed: not run"
    return "" if device.type == "cuda" else "liger_kernel needs a GPU: not run"


def print_rows(rows: Sequence[Measured]) -> None:
    """One line a measurement, with its ratio to ours."""
    first = rows[0]
    for row in rows:
        line = f"{row.num_rows:6} {row.hidden:6} {row.vocab_size:7} {row.dtype:5} {row.name:9}"
        if row.time_s is None or row.peak_bytes is None:
            print(f"{line} {'-':>10} {'-':>8} {'-':>10} {'-':>8}  {row.note}")
            continue
        assert first.time_s is not None
        assert first.peak_bytes is not None
        times, memory = row.time_s / first.time_s, row.peak_bytes / first.peak_bytes
        print(
            f"{line} {row.time_s * 1e3:7.1f} ms {times:7.2f}x {row.peak_bytes / 1e6:7.0f} MB"
            f" {memory:7.2f}x {row.gradient_bytes / 1e6:9.0f} MB"
        )


def parse_shape(text: str) -> Shape:
    """ROWSxHIDDENxVOCAB."""
    rows, hidden, vocab = (int(part) for part in text.split("x"))
    return rows, hidden, vocab


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every shape, print a table, write JSON."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=parse_shape, nargs="+", metavar="ROWSxHIDDENxVOCAB")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="fp32 on the CPU, bf16 on a GPU")
    parser.add_argument("--chunk-rows", type=int, default=VocabularyShard.chunk_rows)
    parser.add_argument("--repeats", type=int, default=3, help="passes to take the fastest of")
    parser.add_argument("--skip-above", type=float, help="GB; 8 on the CPU, 75 on a GPU")
    parser.add_argument("--json", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    torch.set_num_threads(1)
    options.dtype = options.dtype or ("bf16" if gpu else "fp32")
    options.skip_above = options.skip_above or (75 if gpu else 8)
    print(
        f"{'rows':>6} {'hidden':>6} {'vocab':>7} {'dtype':5} {'who':9} {'time':>10} {'to ours':>8}"
        f" {'peak':>10} {'to ours':>8} {'gradients':>12}"
    )
    rows: list[Measured] = []
    for shape in options.shapes or (GPU_SHAPES if gpu else CPU_SHAPES):
        found = measure_shape(shape, options)
        print_rows(found)
        rows += found
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
