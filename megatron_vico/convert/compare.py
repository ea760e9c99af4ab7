"""How two checkpoints differ, tensor by tensor under the mapping table's names, whatever the forms
of the two.

One pair of tensors is in memory at a time. Optimizers are not compared, nor the rows that pad a
vocabulary.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_vico.convert.describe import Checkpoint, Weight, matching
from megatron_vico.errors import CheckpointError

Kind = Literal[
    "values differ", "dtype differs", "shape differs", "only in the first", "only in the second"
]

_BLOCK = 1 << 22
"""Numbers whose difference is taken at once: their float64 copies take 100 MB, whatever the
tensor's size."""


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
    first: Checkpoint,
    second: Checkpoint,
    *,
    match: str | None = None,
    advance: Callable[[int], object] = lambda num_bytes: None,
) -> Comparison:
    """Compare the weights of two checkpoints.

    Args:
        first: what differences are measured from.
        second: the other.
        match: glob on the table's names; unset, all tensors.
        advance: told the bytes of each pair when it has been compared.

    Returns:
        The comparison; differences are in the order of the table.

    Raises:
        CheckpointError: if nothing matches, or a file cannot be read.
    """
    names = matching(dict(first.weights) | dict(second.weights), match)
    if not names:
        raise CheckpointError(f"no tensor of {first.path} or {second.path} matches {match!r}.")
    differences = []
    for name in names:
        one, other = first.weights.get(name), second.weights.get(name)
        found = _difference(name, one, other)
        differences += [] if found is None else [found]
        if one is not None and other is not None:
            advance(one.num_bytes + other.num_bytes)
    return Comparison(num_same=len(names) - len(differences), differences=tuple(differences))


def bytes_to_compare(first: Checkpoint, second: Checkpoint, *, match: str | None = None) -> int:
    """What `compare` will have told `advance` in all."""
    shared = [name for name in matching(first.weights, match) if name in second.weights]
    return sum(first.weights[name].num_bytes + second.weights[name].num_bytes for name in shared)


def _difference(name: str, first: Weight | None, second: Weight | None) -> Difference | None:
    differing = functools.partial(
        Difference, name=name, first=_described(first), second=_described(second)
    )
    if first is None:
        return differing(kind="only in the second")
    if second is None:
        return differing(kind="only in the first")
    if first.shape != second.shape:
        return differing(kind="shape differs")
    one, other = first.read(), second.read()
    same_format = first.dtypes == second.dtypes
    if same_format and _same_bits(one, other):
        return None
    largest, relative = _distance(one, other)
    return differing(
        kind="values differ" if same_format else "dtype differs",
        max_difference=largest,
        relative_norm=relative,
    )


def _described(weight: Weight | None) -> str:
    if weight is None:
        return ""
    dtypes = "/".join(sorted(str(dtype).removeprefix("torch.") for dtype in weight.dtypes))
    return f"{dtypes} {list(weight.shape)}"


def _same_bits(first: Tensor, second: Tensor) -> bool:
    """Bits rather than numbers, for a NaN is not equal to itself."""
    return torch.equal(first.flatten().view(torch.uint8), second.flatten().view(torch.uint8))


def _distance(first: Tensor, second: Tensor) -> tuple[float, float]:
    """(largest |second - first|, norm of second - first over that of first), NaN where either has
    one."""
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
