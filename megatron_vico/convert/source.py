"""A model's tensors by name, none of them read: what is converted, inspected and compared.

open.py makes sources of folders in either form, modules.py of modules in memory. Embedding and head
have the real vocabulary's rows: those that Megatron adds stay on its side.
"""

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_vico.config.registry import ModelConfig
from megatron_vico.config.stages import Module
from megatron_vico.convert.initial import initial_tensor
from megatron_vico.convert.names.internvl import Entry, entries
from megatron_vico.convert.options import Layout
from megatron_vico.errors import CheckpointError, listed


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_parameters(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return self.num_parameters * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a folder holds and says of itself, for people."""

    path: Path
    facts: Mapping[str, str]
    stored: Mapping[str, TensorInfo]
    """By the folder's own names (a Megatron checkpoint's are the table's), the optimizer's too."""

    rows: Mapping[str, str]
    """The table's name for each stored tensor that it maps."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The tensors of a model, none of them read."""

    model: ModelConfig

    where: str
    """For errors: which folder, and what it is."""

    tensors: Mapping[str, TensorInfo]
    """By the table's names, in its order; after them, under its own name, what no row can use."""

    read_tensor: Callable[[str], Tensor]
    """The tensor of a name in `tensors`."""

    problems: tuple[str, ...] = ()
    """Tensors that are missing, unknown, or of a wrong shape or format; empty where it is whole."""

    companions: Path | None = None
    """Folder of the tokenizer and other files that travel along."""

    layout: Layout | None = None
    """Of a Hugging Face folder."""

    trained: tuple[Module, ...] | None = None
    """Modules that are there and do not hold what they were drawn with; None where it is not
    said."""

    contents: Contents | None = None
    """Of a folder."""

    @property
    def dtype(self) -> torch.dtype:
        """The format that most of its numbers have."""
        counts: Counter[torch.dtype] = Counter()
        for info in self.tensors.values():
            counts[info.dtype] += info.num_parameters
        return counts.most_common(1)[0][0]


def check_whole(source: Source) -> Source:
    """The source itself; CheckpointError that lists what is wrong with its tensors, if anything."""
    if source.problems:
        raise CheckpointError(f"{source.where}: {'; '.join(source.problems)}.")
    return source


def problems_of(
    found: Collection[str], expected: Collection[str], wrong: Collection[str] = ()
) -> tuple[str, ...]:
    """What to say of names that are missing or unknown, and of tensors that do not fit."""
    lists = {
        "missing tensors": set(expected) - set(found),
        "tensors that no row maps": set(found) - set(expected),
        "wrong shape or format": wrong,
    }
    return tuple(f"{what}: {listed(names)}" for what, names in lists.items() if names)


def problems_with(found: Mapping[str, TensorInfo], rows: Mapping[str, Entry]) -> tuple[str, ...]:
    """As `problems_of`, of tensors under the table's names."""
    wrong = wrong_shapes(found, {name: row.shape for name, row in rows.items()})
    return problems_of(found, rows, wrong)


def wrong_shapes(
    found: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """A clause for each tensor whose shape is not the expected one."""
    return [
        f"{name} has shape {info.shape}, expected {expected[name]}"
        for name, info in found.items()
        if info.shape != expected.get(name, info.shape)
    ]


def completed(source: Source, *, seed: int) -> Source:
    """A source of every tensor of the table: what it lacks of connectors and ViR is drawn."""
    shapes = {name: row.shape for name, row in entries(source.model, layout="flash").items()}
    dtype = source.dtype
    tensors = {
        name: source.tensors.get(name) or TensorInfo(shape=shape, dtype=dtype)
        for name, shape in shapes.items()
    }

    def read_tensor(name: str) -> Tensor:
        if name in source.tensors:
            return source.read_tensor(name)
        return initial_tensor(name, shapes=shapes, seed=seed).to(dtype)

    return replace(source, tensors=tensors, read_tensor=read_tensor)


def cast(source: Source, dtype: torch.dtype) -> Source:
    """A source whose tensors all have one format."""
    return replace(
        source,
        tensors={name: replace(info, dtype=dtype) for name, info in source.tensors.items()},
        read_tensor=lambda name: source.read_tensor(name).to(dtype),
    )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal in format, shape and every bit."""
    # Bytes rather than numbers: a NaN is not equal to itself, and 0 is equal to -0.
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(bytes_of(one), bytes_of(other))
    )


def dtype_name(dtype: torch.dtype) -> str:
    """The name config.json uses for a format, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def bytes_of(tensor: Tensor) -> Tensor:
    """Its memory, in order."""
    return tensor.reshape(-1).view(torch.uint8)
