#!/usr/bin/env python3
"""What the KL head has to do on a Hopper GPU, counted without one.

    python benchmarks/kl_floor.py
    python benchmarks/kl_floor.py --shape 32768x4096x151936 --tflops 790 --tb-per-s 4.3

Operations, bytes, and the least time of both at the rates of the hardware: a step of the work takes
what is longer of its operations and its traffic with memory, and steps follow one another. Kernels
are compiled for sm_90: registers, spilled bytes, and instructions a column, held against what the
schedulers issue while the column's bytes come. The peak is that of the product's own code on the
meta device, where torch does the kernels' work in blocks of 64 MiB, which count too. Rates are
those of bf16 products and of copies that such cards reach: 795 TFLOP/s and 3.0 TB/s (H100), 790 and
4.3 (H200); the head itself has run on none.
"""

import argparse
import functools
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kl_head import Shape, parse_shape
from megatron_vico.config.schema import WIDE_ROWS
from megatron_vico.models.heads.vocabulary import VocabularyShard
from megatron_vico.planning.meter import Meter
from tests.unit.models.heads.kl_heads import Heads, ours, with_main_grad

CHUNK = VocabularyShard.chunk_rows
# 132 processors of four schedulers, an instruction of 32 lanes a cycle each, at 1.7 GHz.
LANES_PER_S = 132 * 4 * 32 * 1.7e9
KERNELS: dict[str, tuple[str, dict[str, str]]] = {
    "statistics": (
        "statistics_kernel",
        {"policy": "*fp32", "reference": "*fp32", "found": "*fp32"},
    ),
    "gradient, bf16": ("gradient_kernel", {"gradient": "*bf16", "WITH_GRADIENT": "True"}),
    "gradient, in place": ("gradient_kernel", {"gradient": "*fp32", "WITH_GRADIENT": "True"}),
    "value alone": ("gradient_kernel", {"gradient": "*fp32", "WITH_GRADIENT": "False"}),
}


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler says of a kernel for sm_90."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions_per_column: float
    """Of the loop over the columns, for one of them."""

    loads_of_16_bytes: bool


@dataclass(frozen=True, kw_only=True)
class Work:
    """One step, for all rows."""

    name: str
    flops: float
    num_bytes: float

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """At least; the longer of the two."""
        return max(self.flops / flops_per_s, self.num_bytes / bytes_per_s)


def compiled(name: str, *, aligned: bool = True) -> Compiled:
    """A kernel of `KERNELS` for logits whose rows begin at multiples of 64 bytes, or anywhere."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_vico.models.heads import kl_kernels

    kernel_name, given = KERNELS[name]
    kernel = getattr(kl_kernels, kernel_name)
    signature, constants = {}, {}
    for argument in kernel.arg_names:
        if argument.isupper():
            signature[argument] = "constexpr"
            constants[argument] = given.get(argument) == "True" or kl_kernels.BLOCK
        else:
            signature[argument] = "i32" if argument == "num_columns" else "*fp32"
    constants |= {key: value == "True" for key, value in given.items() if key in constants}
    signature |= {key: value for key, value in given.items() if key not in constants}
    sixteen = [["tt.divisibility", 16]]
    whole = [kind[0] == "*" or (aligned and kind == "i32") for kind in signature.values()]
    result = triton.compile(
        ASTSource(
            kernel,
            signature,
            constexprs=constants,
            attrs={(index,): sixteen for index, is_whole in enumerate(whole) if is_whole},
        ),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": kl_kernels.NUM_WARPS},
    )
    usage = _tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", result.asm["cubin"])
    code = _tool(triton.knobs.nvidia.nvdisasm.path, "-c", result.asm["cubin"])
    of = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    return Compiled(
        registers=of["REG"],
        spilled_bytes=of["STACK"] + of["LOCAL"],
        shared_bytes=of["SHARED"] + result.metadata.shared,
        instructions_per_column=_loop(code) * 32 * kl_kernels.NUM_WARPS / kl_kernels.BLOCK,
        loads_of_16_bytes="LDG.E.128" in code,
    )


def _tool(path: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [path, option, file.name], capture_output=True, text=True, check=True
        ).stdout


def _loop(code: str) -> int:
    """Instructions of the longest loop in a disassembly."""
    labels: dict[str, int] = {}
    count, longest = 0, 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif re.match(r"\s+/\*[0-9a-f]+\*/\s+\S", line):
            count += 1
            back = re.search(r"BRA.*\((\.L_x_\d+)\)", line)
            if back and back[1] in labels:
                longest = max(longest, count - labels[back[1]])
    return longest


def work(shape: Shape) -> list[Work]:
    """Loss and both gradients of bf16 rows and heads, on one rank, with a float32 `main_grad`."""
    rows, hidden, vocab = shape
    chunks, groups = -(-rows // CHUNK), -(-rows // WIDE_ROWS)
    product, logits = 2.0 * rows * hidden * vocab, float(rows) * vocab
    weight, hidden_bytes = 2 * hidden * vocab, 2 * rows * hidden
    return [
        Work(
            name="logits of both models",
            flops=2 * product,
            num_bytes=2 * (chunks * weight + hidden_bytes + 4 * logits),
        ),
        Work(name="statistics", flops=0, num_bytes=8 * logits),
        Work(name="value and gradient", flops=0, num_bytes=10 * logits),
        Work(
            name="gradient of the rows",
            flops=product,
            num_bytes=groups * weight + 2 * logits + 2 * hidden_bytes,
        ),
        Work(
            name="gradient of the head",
            flops=product,
            num_bytes=groups * 2 * 4 * hidden * vocab + 2 * logits + hidden_bytes,
        ),
    ]


def counted(shape: Shape) -> tuple[int, int]:
    """Bytes at the peak above inputs and outputs, and operations, of the product's code."""
    rows, hidden, vocab = shape
    make = functools.partial(torch.empty, dtype=torch.bfloat16, device="meta")
    with Meter() as meter:
        heads = with_main_grad(
            Heads(
                policy_rows_RH=make(rows, hidden).requires_grad_(),
                policy_weight_VH=make(vocab, hidden),
                reference_rows_RH=make(rows, hidden),
                reference_weight_VH=make(vocab, hidden),
                row_weight_R=torch.empty(rows, device="meta"),
                vocab_size=vocab,
            )
        )
        inputs = meter.total
        ours(heads, CHUNK).backward()
    outputs = 2 * rows * hidden
    return max(meter.counted.peak.values()) - inputs - outputs, meter.counted.flops.total()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=parse_shape, default=(8192, 4096, 151936))
    parser.add_argument("--tflops", type=float, default=795)
    parser.add_argument("--tb-per-s", type=float, default=3.0)
    options: Any = parser.parse_args(arguments)
    rates = options.tflops * 1e12, options.tb_per_s * 1e12
    print(f"{'':24}{'TFLOP':>8}{'GB':>8}{'at least ms':>13}")
    steps = work(options.shape)
    for step in steps:
        print(
            f"{step.name:24}{step.flops / 1e12:8.2f}{step.num_bytes / 1e9:8.1f}"
            f"{1e3 * step.seconds(*rates):13.2f}"
        )
    products = sum(step.flops for step in steps) / rates[0]
    total = sum(step.seconds(*rates) for step in steps)
    print(f"all {1e3 * total:.1f} ms, products alone {1e3 * products:.1f} ms")
    peak, flops = counted(options.shape)
    print(
        f"the code on no device: {flops / 1e12:.2f} TFLOP, peak {peak / 1e9:.2f} GB above the rest"
    )
    for name in KERNELS:
        of = compiled(name)
        columns_per_s = rates[1] / (10 if name == "gradient, bf16" else 8)
        share = of.instructions_per_column * columns_per_s / LANES_PER_S
        print(
            f"{name}: {of.registers} registers, {of.spilled_bytes} bytes spilled,"
            f" {of.instructions_per_column:.0f} instructions a column,"
            f" {share:.0%} of the issue slots"
        )


if __name__ == "__main__":
    main()
