"""Tensors of folders of safetensors, compared bit for bit."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def read_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, by name."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal in number format, shape and every bit: a NaN is equal to itself, 0 is not -0."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        *(each.detach().contiguous().flatten().view(torch.uint8) for each in (one, other))
    )


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Equal in names and every tensor."""
    return found.keys() == expected.keys() and all(
        same_bits(found[name], tensor) for name, tensor in expected.items()
    )
