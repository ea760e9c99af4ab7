"""TransformerEngine's FP8 kernels in plain torch: casts to torch.float8 types with true scales.

What is quantised is in TransformerEngine's own tensor classes, in the layouts its kernels use on
Hopper: rows for one operand of a product, a transposed copy for the other. A product takes the copy
that Hopper's would, and fails where that is missing or where its length is no multiple of 16.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BLOCK = 128

_TORCH_DTYPES = {7: torch.float8_e4m3fn, 8: torch.float8_e5m2}


def quantize(
    tensor: Tensor, quantizer: Any, output: Any = None, no_op: Tensor | None = None
) -> Any:
    """A tensor as FP8, in the copies that the quantizer asks for; into `output` if there is one."""
    assert no_op is None
    parts = (_blockwise if hasattr(quantizer, "block_len") else _tensorwise)(tensor, quantizer)
    if output is None:
        return _made(tensor, quantizer, parts)
    for name, value in parts.items():
        old = getattr(output, name)
        if isinstance(old, Tensor) and isinstance(value, Tensor):
            old.copy_(value.view(old.shape))
        else:
            setattr(output, name, value)
    return output


def create_empty_quantized_tensor(
    quantizer: Any, shape: Sequence[int], dtype: torch.dtype, *where: Any
) -> Any:
    """Room for what ranks gather in FP8, in the copies that the quantizer asks for."""
    return quantize(torch.zeros(*shape, dtype=dtype), quantizer)


def split_quantize(
    tensor: Tensor,
    splits: Sequence[int],
    quantizers: Sequence[Any],
    *,
    disable_bulk_allocation: bool = False,
) -> Any:
    """Runs of rows, each as FP8 by a quantizer of its own, or as they are."""
    runs = tensor.split(list(splits))
    if quantizers[0] is None:
        return runs
    return [quantize(run, each) for run, each in zip(runs, quantizers, strict=True)]


def dequantize(tensor: Any, dtype: Any) -> Tensor:
    """Back, in the format the tensor stands for."""
    return _values(tensor, transposed=False).view(tensor.size()).to(tensor._dtype)


def fp8_transpose(data: Tensor, dtype: Any, *, out: Tensor | None = None) -> Tensor:
    """The last dimension first."""
    value = data.movedim(-1, 0).contiguous()
    return value if out is None else out.copy_(value)


def product(a: Any, transpose_a: bool, b: Any, transpose_b: bool) -> Tensor:
    """B A in column-major terms, in fp32; of FP8 operands as Hopper has them."""
    length = b.size()[-1] if not transpose_b else b.size()[:-1].numel()
    assert _is_fp8(a) == _is_fp8(b), "FP8 with another format"
    assert not _is_fp8(a) or length % 16 == 0, f"a product over {length}, no multiple of 16"
    left, right = _values(a, transposed=not transpose_a), _values(b, transposed=transpose_b)
    return (right.T if transpose_b else right) @ (left.T if transpose_a else left)


def _is_fp8(operand: Any) -> bool:
    return hasattr(operand, "_fp8_dtype")


def _values(operand: Any, *, transposed: bool) -> Tensor:
    """An operand [rows, columns] in fp32; an FP8 one from its rows or from its transposed copy."""
    if not _is_fp8(operand):
        plain: Tensor = operand.reshape(-1, operand.shape[-1]).float()
        return plain
    in_blocks = hasattr(operand, "_is_2D_scaled")
    if in_blocks:
        side = "columnwise" if transposed else "rowwise"
        data, scale_inv = (getattr(operand, f"_{side}_{part}") for part in ("data", "scale_inv"))
    else:
        assert not (transposed and operand._transpose_invalid), "no transposed copy"
        data, scale_inv = operand._transpose if transposed else operand._data, operand._scale_inv
    assert data is not None, "no such copy"
    matrix = data.reshape(len(data), -1) if transposed else data.reshape(-1, data.shape[-1])
    matrix = matrix.view(_TORCH_DTYPES[int(operand._fp8_dtype)]).float()
    if in_blocks:
        two = operand._is_2D_scaled
        scale_inv = _spread(scale_inv if two else scale_inv.T, matrix.shape, two=two)
    matrix = matrix * scale_inv
    return matrix.T if transposed else matrix


def _made(tensor: Tensor, quantizer: Any, parts: dict[str, Any]) -> Any:
    from transformer_engine.pytorch.tensor import float8_blockwise_tensor, float8_tensor

    if "_rowwise_data" in parts:
        module, name = float8_blockwise_tensor, "Float8BlockwiseQTensor"
        fields = {key[1:]: value for key, value in parts.items()}
        fields["is_2D_scaled"] = quantizer.block_scaling_dim == 2
    else:
        module, name = float8_tensor, "Float8Tensor"
        fields = {
            "data": parts["_data"],
            "fp8_scale_inv": parts["_scale_inv"],
            "data_transpose": parts["_transpose"],
        }
    fields |= {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    if quantizer.internal:
        return getattr(module, f"{name}Storage")(**fields, fake_dtype=tensor.dtype)
    return getattr(module, name)(
        shape=tensor.shape, dtype=tensor.dtype, device=tensor.device, requires_grad=False, **fields
    )


def _tensorwise(tensor: Tensor, quantizer: Any) -> dict[str, Any]:
    """One scale: that of delayed scaling is given, that of current scaling is found here."""
    if hasattr(quantizer, "with_amax_reduction"):
        amax = tensor.abs().amax().float() if tensor.numel() else torch.zeros(())
        if quantizer.with_amax_reduction:
            group = quantizer._canonicalized_amax_reduction_group()
            dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
        scale = _scale(amax, quantizer)
    else:
        scale = quantizer.scale
    data = _cast(tensor, scale, quantizer.dtype)
    return {
        "_data": data if quantizer.rowwise_usage else None,
        "_transpose": data.movedim(-1, 0).contiguous() if quantizer.columnwise_usage else None,
        "_transpose_invalid": not quantizer.columnwise_usage,
        "_scale_inv": scale.reciprocal().view(1),
    }


def _blockwise(tensor: Tensor, quantizer: Any) -> dict[str, Any]:
    """A scale for each 128 x 128 values of a weight, for each 1 x 128 of anything else."""
    parts: dict[str, Any] = {}
    two = quantizer.block_scaling_dim == 2
    for side, wanted in (
        ("rowwise", quantizer.rowwise_usage),
        ("columnwise", quantizer.columnwise_usage),
    ):
        stored = tensor if side == "rowwise" else tensor.movedim(-1, 0)
        matrix = stored.reshape(-1, tensor.shape[-1]) if side == "rowwise" else stored.flatten(1)
        amax = _block_amax(matrix.float(), two=two)
        scale = _scale(amax, quantizer)
        data = _cast(matrix, _spread(scale, matrix.shape, two=two), quantizer.dtype)
        inverse = scale.reciprocal() if two else scale.reciprocal().T
        padded = torch.nn.functional.pad(inverse, (0, -inverse.shape[1] % 4))
        shape = quantizer.get_scale_shape(tensor.shape, side == "columnwise")
        assert tuple(padded.shape) == tuple(shape), (side, padded.shape, shape)
        parts[f"_{side}_data"] = data.view(stored.shape) if wanted else None
        parts[f"_{side}_scale_inv"] = padded.contiguous() if wanted else None
    return parts


def _block_amax(matrix: Tensor, *, two: bool) -> Tensor:
    rows, columns = matrix.shape
    pad = (0, -columns % BLOCK, 0, -rows % BLOCK if two else 0)
    padded = torch.nn.functional.pad(matrix.abs(), pad)
    blocks = padded.unflatten(1, (-1, BLOCK)).amax(-1)
    return blocks.unflatten(0, (-1, BLOCK)).amax(1) if two else blocks


def _spread(blocks: Tensor, shape: Sequence[int], *, two: bool) -> Tensor:
    """A value for each element, from one for each block."""
    spread = blocks.repeat_interleave(BLOCK, 1)[:, : shape[1]]
    return spread.repeat_interleave(BLOCK, 0)[: shape[0]] if two else spread[: shape[0]]


def _scale(amax: Tensor, quantizer: Any) -> Tensor:
    largest = torch.finfo(_TORCH_DTYPES[int(quantizer.dtype)]).max
    return _scale_of(amax, largest, quantizer.force_pow_2_scales, quantizer.amax_epsilon)


def _scale_of(amax: Tensor, largest: float, power_of_2: bool, epsilon: float) -> Tensor:
    amax = amax.clamp(min=epsilon)
    scale = (largest / amax).clamp(max=torch.finfo(torch.float32).max)
    scale = torch.where((amax == 0) | amax.isinf(), 1.0, scale)
    if power_of_2:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(mantissa), exponent - 1)
    return scale


def _cast(tensor: Tensor, scale: Tensor, dtype: Any) -> Tensor:
    fp8 = _TORCH_DTYPES[int(dtype)]
    largest = torch.finfo(fp8).max
    return (tensor.float() * scale).clamp(-largest, largest).to(fp8).view(torch.uint8)


# Of masters that are cast to FP8 weights, a data-parallel rank's part of each.


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    """The largest absolute value."""
    amax.fill_(tensor.abs().amax())


def multi_tensor_compute_scale_and_scale_inv(
    chunk: int,
    no_op: Tensor,
    lists: Sequence[Sequence[Tensor]],
    largest: float,
    power_of_2: bool,
    epsilon: float,
) -> None:
    """Scales of many tensors and their inverses."""
    for amax, scale, scale_inv in zip(*lists, strict=True):
        scale.copy_(_scale_of(amax, largest, power_of_2, epsilon))
        scale_inv.copy_(scale.reciprocal())


def fp8_block_scaling_compute_partial_amax(
    tensor: Tensor, amax: Tensor, rows: int, columns: int, start: int, block: int
) -> None:
    """Of each block of a matrix, as far as a run of its elements goes."""
    whole = torch.zeros(rows * columns)
    whole[start : start + tensor.numel()] = tensor.flatten().float()
    found = _block_amax(whole.view(rows, columns), two=True)
    amax[: found.shape[0], : found.shape[1]] = found


def fp8_block_scaling_partial_cast(
    tensor: Tensor,
    out: Tensor,
    scale: Tensor,
    rows: int,
    columns: int,
    start: int,
    block: int,
    dtype: Any,
) -> None:
    """A run of a matrix's elements as FP8."""
    each = _spread(scale, (rows, columns), two=True).flatten()[start : start + tensor.numel()]
    out.copy_(_cast(tensor.flatten(), each, dtype))


def fused_multi_row_padding(
    source: Tensor, out: Tensor, lens: Sequence[int], padded: Sequence[int]
) -> None:
    """Zero rows after each run of rows."""
    for run, target in zip(source.split(list(lens)), out.split(list(padded)), strict=True):
        target[: len(run)] = run
        target[len(run) :] = 0


def fused_multi_row_unpadding(
    source: Tensor, out: Tensor, padded: Sequence[int], lens: Sequence[int]
) -> None:
    """Without those rows."""
    for run, target in zip(source.split(list(padded)), out.split(list(lens)), strict=True):
        target.copy_(run[: len(target)])
