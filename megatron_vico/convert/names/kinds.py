"""How one Megatron tensor and the file tensors with the same numbers correspond, both ways.

A kind only splits, joins or reorders rows, so a trip there and back returns every bit. It works on
meta tensors too, which is how the table's file shapes are known without memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Mapping(Protocol):
    """One kind of correspondence; what it is given has the shapes of the table."""

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The file tensors of a Megatron tensor, in the order of the row's file names."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        """The Megatron tensor of file tensors, which come in the order of the row's file names."""


@dataclass(frozen=True)
class Direct:
    """The same tensor under another name."""

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The tensor itself."""
        return (tensor,)

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensor itself."""
        (tensor,) = tensors
        return tensor


DIRECT = Direct()


@dataclass(frozen=True, kw_only=True)
class SplitQKV:
    """Megatron's fused linear_qkv <-> three tensors q, k, v; for weights and biases.

    Megatron interleaves by query group: the group's query heads, then its key head, then its value
    head. With as many groups as heads this is its layout of plain multi-head attention.
    """

    num_heads: int
    num_query_groups: int
    head_dim: int

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """(q, k, v), each head-major."""
        queries = self.num_heads // self.num_query_groups
        grouped = tensor.view(self.num_query_groups, queries + 2, self.head_dim, *tensor.shape[1:])
        parts = grouped.split([queries, 1, 1], dim=1)
        return tuple(part.reshape(-1, *tensor.shape[1:]) for part in parts)

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        """The fused tensor of (q, k, v)."""
        rest = tensors[0].shape[1:]
        grouped = [part.view(self.num_query_groups, -1, self.head_dim, *rest) for part in tensors]
        return torch.cat(grouped, dim=1).reshape(-1, *rest)


class JoinedQKV(SplitQKV):
    """The same <-> one tensor of rows q | k | v, as in remote-code InternViT.

    It has as many groups as heads.
    """

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The one tensor with rows q | k | v."""
        return (torch.cat(super().to_hf(tensor)),)

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        """The fused tensor of the one with rows q | k | v."""
        (tensor,) = tensors
        return super().to_megatron(tensor.chunk(3))


@dataclass(frozen=True)
class GatedMLP:
    """Megatron's linear_fc1 of a gated MLP or an expert, rows gate | up <-> two tensors."""

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """(gate, up)."""
        return tensor.chunk(2)

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        """The fused tensor of (gate, up)."""
        return torch.cat(tuple(tensors))


@dataclass(frozen=True, kw_only=True)
class PaddedVocabulary:
    """A matrix with a row a token <-> the same without the rows that make ranks divide it."""

    vocab_size: int
    padded_vocab_size: int

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The rows of real tokens."""
        return (tensor[: self.vocab_size],)

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        """All rows; the added ones are 0 and no token ever reads them."""
        (tensor,) = tensors
        added = tensor.new_zeros(self.padded_vocab_size - self.vocab_size, *tensor.shape[1:])
        return torch.cat([tensor, added]) if len(added) else tensor
