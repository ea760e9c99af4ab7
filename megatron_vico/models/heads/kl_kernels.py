"""The two passes of `vico/consistency.py` over a chunk of logits as Triton kernels, for CUDA.

Torch makes some thirty passes over memory of what is two here: one program a row, one read of both
models' logits for the statistics, one for value and gradient. What ranks exchange between the two
is the same numbers. Only `models/heads/kl.py` imports this file, and only where triton is there.

Each lane of a program keeps statistics of its own, relative to the largest logit it has seen, and
lanes meet once, at the end of the row: no barrier in the loop.

Shape suffixes: C rows of one chunk, K statistics, V vocabulary entries that this rank holds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_vico.vico.consistency import NUM_STATISTICS, Normaliser

BLOCK = 1024
"""Columns that a program reads at a time."""

NUM_WARPS = 8
"""32 threads each, so 4 columns a thread: a load of 16 bytes of each model. With the six statistics
of each lane that is 54 registers, so that an H100 holds four programs a processor, 528 in all: a
chunk of 512 rows at once (`benchmarks/kl_floor.py`)."""

_LOWEST = tl.constexpr(-3.4e38)
"""Below every logit, and finite: the difference of two infinite ones is not a number."""


def statistics(policy_CV: Tensor, reference_CV: Tensor) -> Tensor:
    """[K, C] float32, what `block_statistics` finds; -3.4e38 stands for its minus infinity."""
    num_rows, num_columns = _checked(policy_CV, reference_CV)
    found_KC = policy_CV.new_empty(NUM_STATISTICS, num_rows)
    statistics_kernel[(num_rows,)](
        policy_CV, reference_CV, found_KC, num_columns, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    return found_KC


def kl_and_gradient(
    policy_CV: Tensor,
    reference_CV: Tensor,
    normaliser: Normaliser,
    *,
    scale_C: Tensor | None,
    grad_CV: Tensor,
) -> Tensor:
    """[C] float32, the KL over this rank's part of the vocabulary; scale (p - q) into `grad_CV`.

    `grad_CV` has any floating dtype and may be `policy_CV`; without a scale it is left as it is.
    """
    num_rows, num_columns = _checked(policy_CV, reference_CV, grad_CV)
    scale = normaliser.shift_B if scale_C is None else scale_C
    of_rows = torch.stack([normaliser.reference_B, normaliser.shift_B, scale])
    values_C = policy_CV.new_empty(num_rows)
    gradient_kernel[(num_rows,)](
        policy_CV,
        reference_CV,
        of_rows,
        values_C,
        grad_CV,
        num_columns,
        WITH_GRADIENT=scale_C is not None,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return values_C


def _checked(*matrices: Tensor) -> tuple[int, int]:
    num_rows, num_columns = matrices[0].shape
    assert all(each.is_contiguous() for each in matrices)  # the kernels know of one stride
    assert all(each.shape == (num_rows, num_columns) for each in matrices)
    return num_rows, num_columns


@triton.jit
def _expm1_minus(y: tl.tensor) -> tl.tensor:
    """e^y - 1 - y with all its digits for |y| < 1/2: the series up to y^9, off by 2e-9."""
    series = 1 / 40320 + y * (1 / 362880)
    series = 1 / 720 + y * (1 / 5040 + y * series)
    return y * y * (1 / 2 + y * (1 / 6 + y * (1 / 24 + y * (1 / 120 + y * series))))


@triton.jit
def statistics_kernel(
    policy: tl.tensor,
    reference: tl.tensor,
    found: tl.tensor,
    num_columns: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """`block_statistics` of one row a program."""
    row = tl.program_id(0)
    policy += row.to(tl.int64) * num_columns  # rows times columns may pass 2^31
    reference += row.to(tl.int64) * num_columns
    q_max = tl.full([BLOCK], _LOWEST, tl.float32)
    p_max = tl.full([BLOCK], _LOWEST, tl.float32)
    q_sum = tl.zeros([BLOCK], tl.float32)
    near = tl.zeros([BLOCK], tl.float32)
    p_sum = tl.zeros([BLOCK], tl.float32)
    max_delta = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        p = tl.load(policy + columns, mask=inside, other=float("-inf"))
        q = tl.load(reference + columns, mask=inside, other=float("-inf"))
        delta = tl.where(inside, p - q, 0.0)
        max_delta = tl.maximum(max_delta, tl.abs(delta))
        # Looked at only where all deltas of the row are below 1, so large ones need no digits.
        expm1 = tl.where(tl.abs(delta) < 0.5, delta + _expm1_minus(delta), tl.exp(delta) - 1)
        # Of the two factors e^(old - larger) and e^(new - larger) one is 1.
        above = q - q_max
        factor = tl.exp(-tl.abs(above))
        q_sum = tl.where(above > 0, q_sum * factor + 1, q_sum + factor)
        near = tl.where(above > 0, near * factor + expm1, near + factor * expm1)
        q_max = tl.maximum(q_max, q)
        above = p - p_max
        factor = tl.exp(-tl.abs(above))
        p_sum = tl.where(above > 0, p_sum * factor + 1, p_sum + factor)
        p_max = tl.maximum(p_max, p)
    q_top, p_top = tl.max(q_max, 0), tl.max(p_max, 0)
    q_share = tl.exp(q_max - q_top)
    found += row
    num_rows = tl.num_programs(0)
    tl.store(found, q_top)
    tl.store(found + num_rows, tl.sum(q_sum * q_share, 0))
    tl.store(found + 2 * num_rows, tl.sum(near * q_share, 0))
    tl.store(found + 3 * num_rows, p_top)
    tl.store(found + 4 * num_rows, tl.sum(p_sum * tl.exp(p_max - p_top), 0))
    tl.store(found + 5 * num_rows, tl.max(max_delta, 0))


@triton.jit
def gradient_kernel(
    policy: tl.tensor,
    reference: tl.tensor,
    of_rows: tl.tensor,
    values: tl.tensor,
    gradient: tl.tensor,
    num_columns: tl.tensor,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """`kl_and_gradient_` of one row a program; `gradient` may be `policy`."""
    row = tl.program_id(0)
    num_rows = tl.num_programs(0)
    policy += row.to(tl.int64) * num_columns
    reference += row.to(tl.int64) * num_columns
    gradient += row.to(tl.int64) * num_columns
    log_sum = tl.load(of_rows + row)
    shift = tl.load(of_rows + num_rows + row)
    scale = tl.load(of_rows + 2 * num_rows + row)
    value = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        p = tl.load(policy + columns, mask=inside, other=0.0)
        q = tl.load(reference + columns, mask=inside, other=float("-inf"))
        x = tl.where(inside, (q - p) + shift, 0.0)
        # As in `kl_and_gradient_`: the larger of p and q, times what cannot overflow.
        larger = tl.exp(q - log_sum - tl.minimum(x, 0.0))
        y = -tl.abs(x)
        small = y > -0.5
        minus = _expm1_minus(y)
        expm1 = tl.where(small, y + minus, tl.exp(y) - 1)
        minus = tl.where(small, minus, expm1 - y)
        # q (e^-x - 1 + x), which for x < 0, where y = x, is p (1 - e^y + y e^y).
        value += larger * tl.where(x > 0, minus, y * expm1 - minus)
        if WITH_GRADIENT:
            difference = scale * (larger * tl.where(x > 0, expm1, -expm1))
            tl.store(gradient + columns, difference.to(gradient.dtype.element_ty), mask=inside)
    tl.store(values + row, tl.sum(value, 0))
