"""Plain torch for TransformerEngine's compiled attention and rotary embedding of packed documents.

Shapes: T tokens of all documents of a pack, H heads, D channels of a head. With context parallelism
a document's tokens on a rank are two runs, one of its first and one of its second half.
"""

import enum
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

queries: set[tuple[Any, ...]] = set()
"""What the choice of an attention kernel was asked with."""


class Backend(enum.IntEnum):
    """Kernels of FusedAttention."""

    NVTE_No_Backend = -1
    NVTE_F16_max512_seqlen = 0
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


def get_fused_attn_backend(
    is_training: bool,
    q_type: Any,
    kv_type: Any,
    layout: str,
    bias_type: str,
    mask_type: str,
    softmax_type: str,
    dropout: float,
    *more: Any,
) -> Backend:
    """cuDNN's, for packed documents as this project has them."""
    queries.add((layout, bias_type, mask_type, softmax_type, dropout))
    return Backend.NVTE_F16_arbitrary_seqlen


def fused_rope_forward(t: Tensor, freqs: Tensor, *more: Any) -> Tensor:
    """Rotate the leading channels of [T, H, D] by each token's place in its document."""
    return _rotated(t, freqs, 1.0, *more)


def fused_rope_backward(grad: Tensor, freqs: Tensor, *more: Any) -> Tensor:
    """Rotate back."""
    return _rotated(grad, freqs, -1.0, *more)


def _rotated(
    t: Tensor,
    freqs: Tensor,
    sign: float,
    starts: Tensor | None,
    layout: str,
    interleaved: bool,
    cu_seqlens: Tensor,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    assert (layout, interleaved, starts) == ("NVTE_THD", False, None)
    places = []
    for start, end in _documents(cu_seqlens // cp_size):
        place = torch.arange(end - start)
        if cp_size > 1:
            half = len(place) // 2
            late = (2 * cp_size - cp_rank - 1) * half
            place = torch.cat([place[:half] + cp_rank * half, torch.arange(late, late + half)])
        places.append(place)
    angles = freqs[torch.cat(places), 0, 0].float()[:, None]
    assert len(angles) == len(t), (len(angles), len(t))
    width = angles.shape[-1]
    first, second = t[..., :width].float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), -1)
    value = t[..., :width].float() * angles.cos() + sign * turned * angles.sin()
    return torch.cat((value.to(t.dtype), t[..., width:]), -1)


def fused_attn_fwd(*args: Any) -> list[Tensor]:
    """Attention within each document: output, log-sum-exp, and a generator's state."""
    max_q, max_kv, _, scale, dropout = args[:5]
    causal = _is_causal(args[10])
    cu_q, cu_kv, q, k, v = args[14:19]
    padded_q, padded_kv = args[20:22]
    assert dropout == 0.0
    assert (cu_q.dtype, cu_kv.dtype) == (torch.int32, torch.int32)
    assert isinstance(max_q, int)
    assert int(cu_q.diff().max()) <= max_q
    assert int(cu_kv.diff().max()) <= max_kv
    out, lse = torch.zeros_like(q), torch.zeros(*q.shape[:2], 1)
    seen = 0
    with torch.no_grad():
        for rows, columns in _pairs(cu_q, padded_q, cu_kv, padded_kv):
            scores = _scores(q[rows], k[columns], causal, scale)
            total = scores.logsumexp(-1)
            weights = (scores - total[..., None]).exp()
            values = _for_each_head(v[columns], q)
            out[rows] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
            lse[rows, :, 0] = total.T
            seen += rows.stop - rows.start
    assert seen == len(q), "every token is of a document"
    return [out, lse, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(*args: Any) -> list[Tensor | None]:
    """Gradients of queries, keys and values."""
    scale, causal = args[2], _is_causal(args[12])
    cu_q, cu_kv, q, k, v, out, grad = args[17:24]
    (lse, *_), padded_q, padded_kv = args[25:28]
    grad_q, grad_k, grad_v = (torch.zeros_like(each, dtype=torch.float32) for each in (q, k, v))
    grad, out = grad.reshape(q.shape).float(), out.reshape(q.shape).float()
    for rows, columns in _pairs(cu_q, padded_q, cu_kv, padded_kv):
        weights = (_scores(q[rows], k[columns], causal, scale) - lse[rows, :, 0].T[..., None]).exp()
        keys, values = (_for_each_head(each[columns], q) for each in (k, v))
        of_weights = torch.einsum("qhd,khd->hqk", grad[rows], values)
        inner = (grad[rows] * out[rows]).sum(-1).T[..., None]
        of_scores = weights * (of_weights - inner) * scale
        grad_q[rows] = torch.einsum("hqk,khd->qhd", of_scores, keys)
        for target, factor, other in ((grad_k, of_scores, q[rows]), (grad_v, weights, grad[rows])):
            whole = torch.einsum("hqk,qhd->khd", factor, other.float())
            target[columns] = whole.view(len(whole), k.shape[1], -1, q.shape[2]).sum(2)
    return [grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None]


def _is_causal(mask_type: str) -> bool:
    assert mask_type in ("NVTE_PADDING_CAUSAL_MASK", "NVTE_PADDING_MASK"), mask_type
    return mask_type == "NVTE_PADDING_CAUSAL_MASK"


def _documents(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    ends = cu_seqlens.tolist()
    return list(itertools.pairwise(ends))


def _pairs(
    cu_q: Tensor, padded_q: Tensor | None, cu_kv: Tensor, padded_kv: Tensor | None
) -> Iterator[tuple[slice, slice]]:
    """The rows and columns of each document that is not empty."""

    def runs(cu_seqlens: Tensor, padded: Tensor | None) -> list[slice]:
        starts = (cu_seqlens if padded is None else padded).tolist()
        return [
            slice(start, start + end - begin)
            for start, (begin, end) in zip(starts, _documents(cu_seqlens), strict=False)
        ]

    for rows, columns in zip(runs(cu_q, padded_q), runs(cu_kv, padded_kv), strict=True):
        if rows.stop > rows.start:
            yield rows, columns


def _for_each_head(t: Tensor, q: Tensor) -> Tensor:
    return t.float().repeat_interleave(q.shape[1] // t.shape[1], 1)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", q.float(), _for_each_head(k, q)) * scale
    if causal:
        mask = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(mask, -torch.inf)
    return scores


def thd_read_half_tensor(t: Tensor, cu_seqlens: Tensor, half: int) -> Tensor:
    """One half of each document of [T, ...] or [2, T, ...]."""
    return t.index_select(0 if t.dim() == 3 else 1, _half(cu_seqlens, half))


def thd_second_half_lse_correction(
    lse: Tensor, step: Tensor, cu_seqlens: Tensor, is_packed: bool
) -> None:
    """Add a step's log-sum-exp to that of the second halves."""
    assert is_packed
    where = _half(cu_seqlens, 1)
    lse[:, where] = torch.logaddexp(lse[:, where], step)


def thd_read_second_half_lse(
    lse: Tensor, cu_seqlens: Tensor, is_packed: bool, length: int
) -> Tensor:
    """The log-sum-exp of the second halves."""
    assert is_packed
    return lse[:, _half(cu_seqlens, 1)]


def thd_out_correction(
    out: Tensor,
    step: Tensor,
    lse: Tensor,
    lse_of_step: Tensor,
    cu_seqlens: Tensor,
    only_second_half: bool,
    is_packed: bool,
) -> None:
    """Add a step's output by its share of the sum."""
    assert is_packed
    where = _half(cu_seqlens, 1) if only_second_half else torch.arange(len(out))
    share = (lse_of_step - lse[:, where]).exp().T[..., None]
    out[where] += (step.view(len(where), *out.shape[1:]).float() * share).to(out.dtype)


def thd_grad_correction(
    grad: Tensor, step: Tensor, cu_seqlens: Tensor, first: str, second: str
) -> None:
    """Put a step's gradient into the first halves, the second, or both."""
    dim = 0 if grad.dim() == 3 else 1
    for half, how in enumerate((first, second)):
        if how == "none":
            continue
        where = _half(cu_seqlens, half)
        part = step.index_select(dim, where) if step.shape[dim] == grad.shape[dim] else step
        old = grad.index_select(dim, where)
        new = part.view(old.shape) if how == "copy" else old + part.view(old.shape)
        grad.index_copy_(dim, where, new)


def _half(cu_seqlens: Tensor, half: int) -> Tensor:
    runs = []
    for start, end in _documents(cu_seqlens):
        middle = (start + end) // 2
        runs.append(torch.arange(start, middle) if half == 0 else torch.arange(middle, end))
    return torch.cat(runs)
