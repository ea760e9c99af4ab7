"""What losses on a vocabulary head share: logits in chunks of rows, gradients in the same pass.

The logits of 32,768 rows over 151,936 entries are 20 GB in float32, for each of two models. Here
one chunk of them lives at a time: its loss, the gradient of its rows and its share of the weight's
gradient are done before the next chunk begins. The head may be split over the vocabulary
(Megatron's tensor parallelism).

Shape suffixes: R rows, C rows of one chunk, B rows of one block of a chunk, H channels, V
vocabulary entries that this rank holds, K numbers a row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vico.config.schema import WIDE_ROWS

# Numbers in a block of the weight: 32 MiB in float32, which fits the second-level cache of an H100.
_WEIGHT_BLOCK = 2**23
# Numbers in a block of the logits, for elementwise work: 1 MiB in float32 stays in a CPU core's
# cache; a GPU wants few large launches, and 64 MiB are a tenth of 512 rows.
_CPU_BLOCK, _GPU_BLOCK = 2**18, 2**24


@dataclass(frozen=True, kw_only=True)
class VocabularyShard:
    """How a vocabulary head is split, and how many rows of it are worked on at a time."""

    group: torch.distributed.ProcessGroup | None
    """The tensor-parallel group, each rank with an equal share of the weight's rows; None: one rank
    holds them all."""

    vocab_size: int
    """Real entries, over all ranks; the weight's rows beyond them are padding and never take
    part."""

    chunk_rows: int = 512
    """Rows whose logits exist at once. Fewer save memory (8 bytes a row and entry, of two models);
    below some 300 a GPU waits for the weight."""

    @property
    def size(self) -> int:
        """Ranks that share the head."""
        return 1 if self.group is None else self.group.size()

    def first(self, weight_VH: Tensor) -> int:
        """The entry of the vocabulary that row 0 of this rank's weight stands for."""
        return 0 if self.group is None else self.group.rank() * len(weight_VH)

    def real(self, weight_VH: Tensor) -> Tensor:
        """The rows of this rank's weight, or of its gradient, that are not padding; may be none."""
        return weight_VH[: max(0, min(self.vocab_size - self.first(weight_VH), len(weight_VH)))]

    def gather(self, numbers_KC: Tensor) -> Tensor:
        """[K, C] of every rank, [ranks, K, C] and equal on all; one collective."""
        if self.size == 1:
            return numbers_KC.unsqueeze(0)
        numbers = numbers_KC.new_empty(self.size * len(numbers_KC), numbers_KC.shape[1])
        torch.distributed.all_gather_into_tensor(numbers, numbers_KC, group=self.group)
        return numbers.view(self.size, *numbers_KC.shape)

    def sum_(self, values_R: Tensor) -> Tensor:
        """Sum over the ranks, in place; one collective, or none where there are no rows."""
        if self.size > 1 and len(values_R):
            torch.distributed.all_reduce(values_R, group=self.group)
        return values_R


class RowLoss(Protocol):
    """A loss of each row of logits, as `head_loss` takes it."""

    @property
    def shard(self) -> VocabularyShard:
        """How the head is split."""
        ...

    def check(self, rows_RH: Tensor, weight_VH: Tensor) -> None:
        """Raise ValueError unless the loss fits these rows and this rank's weight."""
        ...

    def chunk(
        self,
        logits_CV: Tensor,
        rows: slice,
        *,
        first: int,
        scale_C: Tensor | None,
        grad_CV: Tensor,
    ) -> Tensor:
        """Work on one chunk; every rank of the group calls this for the same rows.

        Args:
            logits_CV: [C, V] float32, over this rank's real entries, perhaps none; overwritten.
            rows: which of all rows the chunk holds.
            first: the entry of the whole vocabulary that column 0 stands for.
            scale_C: [C] float32, a factor of the gradient; None: no gradient is wanted.
            grad_CV: [C, V], perhaps of a shorter dtype, perhaps the logits themselves: where the
                gradient of the logits goes.

        Returns:
            [C] float32, this rank's part of each row's loss: the sum over ranks is the loss.
        """
        ...


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What logits and sums are held in: float32, or what is wider."""
    return torch.promote_types(dtype, torch.float32)


def check_head(rows_RH: Tensor, weight_VH: Tensor, shard: VocabularyShard, *, name: str) -> None:
    """Raise ValueError unless rows and weight fit one another and the vocabulary."""
    if rows_RH.dim() != 2 or weight_VH.dim() != 2 or rows_RH.shape[1] != weight_VH.shape[1]:
        raise ValueError(
            f"{name}: rows are {tuple(rows_RH.shape)} and the head's weight is"
            f" {tuple(weight_VH.shape)}; expected [rows, hidden] and [vocabulary of this rank,"
            " hidden] with the same hidden"
        )
    if rows_RH.dtype != weight_VH.dtype:
        raise ValueError(
            f"{name}: rows are {rows_RH.dtype} but the head's weight is {weight_VH.dtype}; cast the"
            " rows"
        )
    if shard.size * len(weight_VH) < shard.vocab_size:
        raise ValueError(
            f"{name}: {shard.size} ranks with {len(weight_VH)} rows of the head each hold fewer"
            f" than the {shard.vocab_size} entries of the vocabulary; the group has to be the one"
            " that the head is split over"
        )


def row_blocks(logits_CV: Tensor) -> Iterator[slice]:
    """Blocks of rows that are small enough for elementwise work with temporaries."""
    budget = _CPU_BLOCK if logits_CV.device.type == "cpu" else _GPU_BLOCK
    return _blocks(len(logits_CV), max(1, budget // max(1, logits_CV.shape[1])))


def logits_of(rows_CH: Tensor, weight_VH: Tensor) -> Tensor:
    """[C, V], accumulated and kept in float32.

    Rounded to bf16, logits put an error of 5 % on the gradient of the KL at 0.2 nats and of 44 % at
    2e-3 nats.
    """
    dtype = accumulation_dtype(rows_CH.dtype)
    if rows_CH.dtype == dtype:
        return rows_CH @ weight_VH.T
    if _has_wide_product(rows_CH):
        return torch.mm(rows_CH, weight_VH.T, out_dtype=dtype)
    wide_CH = rows_CH.to(dtype)
    logits_CV = wide_CH.new_empty(len(rows_CH), len(weight_VH))
    for block in _weight_blocks(weight_VH):
        torch.mm(wide_CH, weight_VH[block].to(dtype).T, out=logits_CV[:, block])
    return logits_CV


def row_values(rows_RH: Tensor, weight_VH: Tensor, *, loss: RowLoss) -> Tensor:
    """[R] float32, the loss of each row, equal on all ranks of the group; no gradient."""
    check_head(rows_RH, weight_VH, loss.shard, name="policy")
    loss.check(rows_RH, weight_VH)
    with torch.no_grad():
        return _sweep(rows_RH, weight_VH, None, _Gradients(rows_RH=None, weight_VH=None), loss=loss)


def head_loss(
    rows_RH: Tensor,
    weight_VH: Tensor,
    row_weight_R: Tensor,
    *,
    loss: RowLoss,
    observe: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Weighted sum of the rows' losses, with both gradients made in the same pass.

    The gradient of the rows is this rank's share, over its part of the vocabulary: whoever made the
    rows sums it over the group. The weight's gradient is added to `weight.main_grad` where there is
    one, as Megatron's own fused layers do, here in the forward pass: it takes the gradient that
    comes in for 1, which it is unless the loss is scaled (float16), divided or multiplied after
    this call. The rows' gradient, and a weight's that has no `main_grad`, are multiplied by what
    comes in.

    Args:
        rows_RH: [R, H], after the final norm; the same on all ranks of the group.
        weight_VH: [V, H], this rank's share, of the rows' dtype. Without `main_grad`, its gradient
            is gathered in float32 and handed back in its dtype.
        row_weight_R: [R] float32; for Eq. 1, 1 / (response tokens of the row's sample * samples in
            the global batch).
        observe: is handed the loss of each row, [R] float32, without a gradient.

    Returns:
        Scalar float32, equal on all ranks of the group; 0 where there are no rows. Not a view, as
        Megatron's pipeline schedules want it.
    """
    if row_weight_R.shape != rows_RH.shape[:1]:
        raise ValueError(
            f"{len(rows_RH)} rows but row weights of shape {tuple(row_weight_R.shape)}"
        )
    if not torch.is_grad_enabled():
        values_R = row_values(rows_RH, weight_VH, loss=loss)
        if observe is not None:
            observe(values_R)
        return (values_R * row_weight_R).sum()
    check_head(rows_RH, weight_VH, loss.shard, name="policy")
    loss.check(rows_RH, weight_VH)
    total: Tensor = _FusedHead.apply(rows_RH, weight_VH, row_weight_R, loss, observe)
    return total


@dataclass(frozen=True, kw_only=True)
class _Gradients:
    """Where gradients go; None: not wanted."""

    rows_RH: Tensor | None
    weight_VH: Tensor | None

    @property
    def wanted(self) -> bool:
        return self.rows_RH is not None or self.weight_VH is not None


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_RH: Tensor,
        weight_VH: Tensor,
        row_weight_R: Tensor,
        loss: RowLoss,
        observe: Callable[[Tensor], object] | None,
    ) -> Tensor:
        rows_wanted, weight_wanted = ctx.needs_input_grad[:2]
        main_grad_VH = getattr(weight_VH, "main_grad", None) if weight_wanted else None
        own_grad_VH = None
        if weight_wanted and main_grad_VH is None:
            own_grad_VH = torch.zeros_like(weight_VH, dtype=accumulation_dtype(weight_VH.dtype))
        gradients = _Gradients(
            rows_RH=torch.empty_like(rows_RH) if rows_wanted else None,
            weight_VH=own_grad_VH if main_grad_VH is None else main_grad_VH,
        )
        values_R = _sweep(rows_RH, weight_VH, row_weight_R, gradients, loss=loss)
        if main_grad_VH is not None:
            weight_VH.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        ctx.weight_VH = weight_VH if main_grad_VH is not None else None
        ctx.weight_dtype = weight_VH.dtype
        ctx.save_for_backward(gradients.rows_RH, own_grad_VH)
        if observe is not None:
            observe(values_R)
        return (values_R * row_weight_R).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows_RH, grad_weight_VH = ctx.saved_tensors
        if grad_rows_RH is not None:
            grad_rows_RH.mul_(grad)  # in place: a second copy would grow with the rows
        if grad_weight_VH is not None:
            grad_weight_VH = grad_weight_VH.mul_(grad).to(ctx.weight_dtype)
        elif ctx.weight_VH is not None:
            # DDP's hook hangs on the weight's gradient, with no rows too. It is not read, unless
            # `zero_out_wgrad` says that it will be added.
            added = getattr(ctx.weight_VH, "zero_out_wgrad", False)
            grad_weight_VH = (torch.zeros_like if added else torch.empty_like)(ctx.weight_VH)
        return grad_rows_RH, grad_weight_VH, None, None, None


def _sweep(
    rows_RH: Tensor,
    weight_VH: Tensor,
    row_weight_R: Tensor | None,
    gradients: _Gradients,
    *,
    loss: RowLoss,
) -> Tensor:
    """[R], the loss of each row over the whole vocabulary; fills the gradients."""
    shard, first = loss.shard, loss.shard.first(weight_VH)
    weight_VH = shard.real(weight_VH)
    if gradients.weight_VH is not None:
        gradients = replace(gradients, weight_VH=shard.real(gradients.weight_VH))
    values_R = rows_RH.new_empty(len(rows_RH), dtype=accumulation_dtype(rows_RH.dtype))
    scale_R = None
    if row_weight_R is not None and gradients.wanted:
        scale_R = row_weight_R.to(values_R.dtype)
    group_rows = shard.chunk_rows
    if scale_R is not None and _has_wide_product(rows_RH):
        group_rows *= max(1, WIDE_ROWS // group_rows)
    for group in _blocks(len(rows_RH), group_rows):
        grad_GV = _logits_gradient(
            rows_RH[group], weight_VH, group, scale_R, values_R, first=first, loss=loss
        )
        if gradients.rows_RH is not None:
            gradients.rows_RH[group] = _rows_gradient(grad_GV, weight_VH)
        if gradients.weight_VH is not None:
            _add_weight_gradient(gradients.weight_VH, grad_GV, rows_RH[group])
        del grad_GV  # before the logits of the next are made
    return shard.sum_(values_R)


def _logits_gradient(
    rows_GH: Tensor,
    weight_VH: Tensor,
    group: slice,
    scale_R: Tensor | None,
    values_R: Tensor,
    *,
    first: int,
    loss: RowLoss,
) -> Tensor:
    """[G, V], the gradient of the logits of a group of rows, if wanted; fills in their values."""
    if scale_R is None or not _has_wide_product(rows_GH):
        logits_GV = logits_of(rows_GH, weight_VH)
        scale_G = None if scale_R is None else scale_R[group]
        values_R[group] = loss.chunk(
            logits_GV, group, first=first, scale_C=scale_G, grad_CV=logits_GV
        )
        return logits_GV
    # Rounding the gradient of the logits, not the logits, costs 1.5e-3.
    grad_GV = rows_GH.new_empty(len(rows_GH), len(weight_VH))
    # The chunks depend on R alone: each has a collective, and all ranks have to come to all.
    for chunk in _blocks(len(rows_GH), loss.shard.chunk_rows):
        rows = slice(group.start + chunk.start, group.start + chunk.stop)
        values_R[rows] = loss.chunk(
            logits_of(rows_GH[chunk], weight_VH),  # without a name here, so gone with the chunk
            rows,
            first=first,
            scale_C=scale_R[rows],
            grad_CV=grad_GV[chunk],
        )
    return grad_GV


def _rows_gradient(grad_CV: Tensor, weight_VH: Tensor) -> Tensor:
    dtype = accumulation_dtype(weight_VH.dtype)
    if weight_VH.dtype == dtype:
        return grad_CV @ weight_VH
    if _has_wide_product(weight_VH):
        return torch.mm(grad_CV, weight_VH, out_dtype=dtype)
    grad_CH = grad_CV.new_zeros(len(grad_CV), weight_VH.shape[1])
    for block in _weight_blocks(weight_VH):
        grad_CH.addmm_(grad_CV[:, block], weight_VH[block].to(dtype))
    return grad_CH


def _add_weight_gradient(total_VH: Tensor, grad_CV: Tensor, rows_CH: Tensor) -> None:
    """Add grad^T rows."""
    # No [V, H] temporary: 2.5 GB for a vocabulary of 151,936 and 4,096 channels.
    if grad_CV.dtype == total_VH.dtype:
        total_VH.addmm_(grad_CV.T, rows_CH.to(grad_CV.dtype))
    elif _has_wide_product(grad_CV):
        torch.addmm(total_VH, grad_CV.T, rows_CH, out_dtype=total_VH.dtype, out=total_VH)
    else:
        for block in _weight_blocks(total_VH):
            total_VH[block] += grad_CV[:, block].T @ rows_CH.to(grad_CV.dtype)


def _has_wide_product(tensor: Tensor) -> bool:
    """Whether bf16 matrices multiply into float32; no GPU has run it yet, tests emulate it."""
    return tensor.device.type != "cpu" and tensor.dtype in (torch.bfloat16, torch.float16)


def _weight_blocks(weight_VH: Tensor) -> Iterator[slice]:
    return _blocks(len(weight_VH), max(1, _WEIGHT_BLOCK // max(1, weight_VH.shape[1])))


def _blocks(num: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, num)) for start in range(0, num, size))
