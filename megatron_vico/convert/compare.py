"""How two checkpoints of any form differ, tensor by tensor under the mapping table's names.

One pair of tensors is in memory at a time. Optimizers are not compared, nor the rows that pad a
vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from megatron_vico.convert.describe import matching
from megatron_vico.convert.source import Source, TensorInfo, dtype_name, same_bits
from megatron_vico.errors import CheckpointError

Kind = Literal[
    "values differ", "dtype differs", "shape differs", "only in the first", "only in the second"
]

_BLOCK = 1 << 22
"""Numbers whose difference is taken at once: their float64 copies take 100 MB."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A tensor that two checkpoints do not have in common."""

    name: str
    kind: Kind
    first: str
    """Format and shape there; empty where it is absent."""

    second: str
    max_difference: float | None = None
    """Largest |second - first|; None where the shapes differ or one of them is absent."""

    relative_norm: float | None = None
    """Norm of second - first over that of first; infinite where the first is 0."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two checkpoints have in common."""

    num_same: int
    """Tensors that are equal in name, shape, format and every bit."""

    differences: tuple[Difference, ...]


def compare(
    first: Source,
    second: Source,
    *,
    match: str | None = None,
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> Comparison:
    """Compare the weights of two checkpoints; differences are in the order of the table.

    Args:
        match: glob on the table's names; unset, all tensors.
        advance: told the bytes of each pair when it has been compared.

    Raises:
        CheckpointError: if nothing matches, or a file cannot be read.
    """
    names = matching(dict(first.tensors) | dict(second.tensors), match)
    if not names:
        raise CheckpointError(f"no tensor of {first.where} or {second.where} matches {match!r}.")
    differences = []
    for name in names:
        found = _difference(name, first, second)
        differences += [] if found is None else [found]
        if name in first.tensors and name in second.tensors:
            advance(first.tensors[name].num_bytes + second.tensors[name].num_bytes)
    return Comparison(num_same=len(names) - len(differences), differences=tuple(differences))


def bytes_to_compare(first: Source, second: Source, *, match: str | None = None) -> int:
    """What `compare` will have told `advance` in all."""
    shared = [name for name in matching(first.tensors, match) if name in second.tensors]
    return sum(first.tensors[name].num_bytes + second.tensors[name].num_bytes for name in shared)


def _difference(name: str, first: Source, second: Source) -> Difference | None:
    one, other = first.tensors.get(name), second.tensors.get(name)
    differing = partial(Difference, name=name, first=_described(one), second=_described(other))
    if one is None:
        return differing(kind="only in the second")
    if other is None:
        return differing(kind="only in the first")
    if one.shape != other.shape:
        return differing(kind="shape differs")
    tensors = first.read_tensor(name), second.read_tensor(name)
    if same_bits(*tensors):
        return None
    largest, relative = _distance(*tensors)
    return differing(
        kind="values differ" if one.dtype == other.dtype else "dtype differs",
        max_difference=largest,
        relative_norm=relative,
    )


def _described(info: TensorInfo | None) -> str:
    return "" if info is None else f"{dtype_name(info.dtype)} {list(info.shape)}"


def _distance(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Largest |second - first|, and its norm over that of first; NaN where either has one."""
    largest, squares, reference = 0.0, 0.0, 0.0
    for one, other in zip(
        first.flatten().split(_BLOCK), second.flatten().split(_BLOCK), strict=True
    ):
        start = one.double()
        change = other.double() - start
        top = float(change.abs().max())
        largest = top if math.isnan(top) else max(top, largest)
        if math.isnan(largest):
            return largest, largest
        squares += float(change.square().sum())
        reference += float(start.square().sum())
    if squares == 0.0:  # only signs of zeros differ, or only formats
        return largest, 0.0
    return largest, math.sqrt(squares / reference) if reference else math.inf
