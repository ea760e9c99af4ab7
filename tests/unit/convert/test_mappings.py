"""Each kind of mapping against its definition, row by row, and back."""

import pytest
import torch
from torch import Tensor

from megatron_vico.convert.names.kinds import (
    GatedMLP,
    JoinedQKV,
    PaddedVocabulary,
    SplitQKV,
)


def numbered(*shape: int) -> Tensor:
    """A tensor in which every element is different."""
    return torch.arange(torch.Size(shape).numel()).view(shape)


def naive_fused(
    q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, num_groups: int, head_dim: int
) -> Tensor:
    """Megatron's linear_qkv: for each group its query heads, its key head, its value head."""
    rows = []
    for group in range(num_groups):
        for head in range(num_heads):
            if head // (num_heads // num_groups) == group:
                rows += [q[head * head_dim + i] for i in range(head_dim)]
        rows += [k[group * head_dim + i] for i in range(head_dim)]
        rows += [v[group * head_dim + i] for i in range(head_dim)]
    return torch.stack(rows)


@pytest.mark.parametrize("rest", [(), (7,)], ids=["bias", "weight"])
@pytest.mark.parametrize(("num_heads", "num_groups"), [(4, 2), (6, 2), (8, 8), (5, 5), (3, 1)])
def test_split_qkv(num_heads: int, num_groups: int, rest: tuple[int, ...]) -> None:
    kind = SplitQKV(num_heads=num_heads, num_query_groups=num_groups, head_dim=3)
    q = numbered(num_heads * 3, *rest)
    k, v = numbered(num_groups * 3, *rest) + 1000, numbered(num_groups * 3, *rest) + 2000
    fused = naive_fused(q, k, v, num_heads=num_heads, num_groups=num_groups, head_dim=3)
    assert torch.equal(kind.to_megatron((q, k, v)), fused)
    for found, expected in zip(kind.to_hf(fused), (q, k, v), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("rest", [(), (7,)], ids=["bias", "weight"])
def test_joined_qkv(rest: tuple[int, ...]) -> None:
    kind = JoinedQKV(num_heads=5, num_query_groups=5, head_dim=4)
    q, k, v = numbered(60, *rest).chunk(3)
    fused = naive_fused(q, k, v, num_heads=5, num_groups=5, head_dim=4)
    (joined,) = kind.to_hf(fused)
    assert torch.equal(joined, numbered(60, *rest))
    assert torch.equal(kind.to_megatron((joined,)), fused)


def test_gated_mlp() -> None:
    gate, up = numbered(6, 2), numbered(6, 2) + 100
    fused = GatedMLP().to_megatron((gate, up))
    assert torch.equal(fused[:6], gate)  # mcore applies the activation to the first half
    assert torch.equal(fused[6:], up)
    found_gate, found_up = GatedMLP().to_hf(fused)
    assert torch.equal(found_gate, gate)
    assert torch.equal(found_up, up)


def test_padded_vocabulary() -> None:
    kind = PaddedVocabulary(vocab_size=5, padded_vocab_size=8)
    padded = kind.to_megatron((numbered(5, 3) + 1,))
    assert padded.shape == (8, 3)
    assert torch.equal(padded[:5], numbered(5, 3) + 1)
    assert not padded[5:].any()
    (cut,) = kind.to_hf(padded + 9)
    assert torch.equal(cut, numbered(5, 3) + 10)
    even = PaddedVocabulary(vocab_size=5, padded_vocab_size=5)
    assert torch.equal(even.to_megatron((cut,)), cut)
