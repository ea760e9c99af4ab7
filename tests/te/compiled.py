"""Plain torch in the place of `transformer_engine_torch`, TransformerEngine's compiled module.

Names and arguments are those of its version 2.17. What no run of this project calls is left out:
it raises with its name.
"""

import enum
import types
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.te import compiled_attention, compiled_fp8

calls: Counter[str] = Counter()
"""How often each function was called."""


class DType(enum.IntEnum):
    """TransformerEngine's number formats."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


TORCH_DTYPES = {
    DType.kFloat32: torch.float32,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat16: torch.float16,
}


def generic_gemm(
    a: Tensor,
    transpose_a: bool,
    b: Tensor,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: object,
    out_dtype: DType | None,
    bias: Tensor | None,
    bias_dtype: DType,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    **more: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """B A in column-major terms, in fp32, then rounded."""
    assert quantizer is None
    assert not gelu
    assert more["comm_overlap"] is None
    product = compiled_fp8.product(a, transpose_a, b, transpose_b)
    bias_grad = None
    if grad and bias is not None:
        bias_grad = b.reshape(-1, b.shape[-1]).float().sum(0).to(bias.dtype)
    elif bias is not None:
        product = product + bias.float()
    if not transpose_b:
        product = product.view(*b.size()[:-1], product.shape[-1])
    if out is None:
        dtype = a.dtype if out_dtype is None else TORCH_DTYPES[DType(out_dtype)]
        return product.to(dtype), bias_grad, gelu_in, more["extra_output"]
    _put(out, product.view(out.shape), accumulate=accumulate)
    return out, bias_grad, gelu_in, more["extra_output"]


def te_general_grouped_gemm(
    a: Sequence[Tensor],
    transpose_a: bool,
    b: Sequence[Tensor],
    transpose_b: bool,
    out: Sequence[Tensor],
    out_dtype: DType,
    splits: Sequence[int],
    bias: Any,
    bias_dtype: DType,
    is_single_output: bool,
    *more: Any,
) -> Any:
    """As many products of their own, into one tensor or several."""
    accumulate = more[4]
    targets = out[0].split(list(splits)) if is_single_output else out
    for left, right, target in zip(a, b, targets, strict=True):
        product = compiled_fp8.product(left, transpose_a, right, transpose_b)
        _put(target, product, accumulate=accumulate)
    return bias


def _put(target: Tensor, value: Tensor, *, accumulate: bool) -> None:
    if accumulate:
        target.add_(value.to(target.dtype))
    else:
        target.copy_(value)


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    quantizer: object,
    out_dtype: Any,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Tensor, None, Tensor]:
    """Normalised x and one over its root mean square."""
    assert not zero_centered
    dtype = out_dtype if isinstance(out_dtype, torch.dtype) else TORCH_DTYPES[DType(out_dtype)]
    scale = (x.float().square().mean(-1) + eps).rsqrt()
    value = (x.float() * scale[..., None] * weight.float()).to(dtype)
    if quantizer is not None:
        return compiled_fp8.quantize(value, quantizer, out), None, scale
    if out is None:
        return value, None, scale
    out.copy_(value)
    return out, None, scale


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, scale: Tensor, weight: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight."""
    grad_f, x_f = (each.float().reshape(-1, x.shape[-1]) for each in (grad, x))
    scale = scale.reshape(-1, 1)
    scaled = grad_f * weight.float()
    grad_x = scale * (scaled - x_f * scale.square() * (scaled * x_f).mean(-1, keepdim=True))
    grad_weight = (grad_f * x_f * scale).sum(0)
    return grad_x.to(x.dtype).view(x.shape), grad_weight.to(weight.dtype)


def multi_tensor_l2norm(
    chunk: int, no_op: Tensor, lists: Sequence[Sequence[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """The norm of all tensors together, and of each if asked."""
    norms = torch.stack([each.float().norm() for each in lists[0]])
    return norms.norm().view(1), norms if per_tensor else norms.new_empty(0)


def multi_tensor_scale(
    chunk: int, no_op: Tensor, lists: Sequence[Sequence[Tensor]], scale: float
) -> None:
    """target = source * scale."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_scale_tensor(
    chunk: int, no_op: Tensor, lists: Sequence[Sequence[Tensor]], scale: Tensor
) -> None:
    """As `multi_tensor_scale`, by a factor that stays on the device."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_adam(
    chunk: int,
    no_op: Tensor,
    lists: Sequence[Sequence[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """AdamW of gradients, parameters, both moments and, where they are apart, fp32 masters."""
    assert mode == 1, "decoupled weight decay"
    correction1, correction2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    grads, params, means, squares = lists[:4]
    masters = lists[4] if len(lists) == 5 else params
    for grad, param, mean, square, master in zip(
        grads, params, means, squares, masters, strict=True
    ):
        value = grad.float()
        mean.mul_(beta1).add_(value, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(value, value, value=1 - beta2)
        change = (mean / correction1) / ((square / correction2).sqrt() + eps)
        master.sub_(lr * (change + weight_decay * master))
        if master is not param:
            param.copy_(master)


def multi_tensor_adam_param_remainder(
    chunk: int, no_op: Tensor, lists: Sequence[Sequence[Tensor]], *numbers: Any
) -> None:
    """As `multi_tensor_adam`; of the masters only the 16 bits below bfloat16's are kept."""
    for grad, param, mean, square, rest in zip(*lists, strict=True):
        high = param.view(torch.int16).int() << 16
        master = (high + rest.int()).view(torch.float32)
        multi_tensor_adam(chunk, no_op, [[grad], [master], [mean], [square]], *numbers)
        bits = master.view(torch.int32)
        rest.copy_((bits & 0xFFFF).to(torch.int16))  # as a signed number: at most half a step away
        param.copy_(((bits - rest.int()) >> 16).to(torch.int16).view(torch.bfloat16))


def fused_topk_with_score_function_fwd(
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float | None,
    score_function: str,
    expert_bias: Tensor | None,
    *more: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over the chosen experts' logits, in their places, and which they are."""
    assert (score_function, use_pre_softmax, expert_bias) == ("softmax", False, None)
    assert (num_groups or 1, scaling_factor or 1.0) == (1, 1.0)
    chosen = logits.topk(topk, dim=-1)
    scores = chosen.values.float().softmax(-1).to(logits.dtype)
    probs = torch.zeros_like(logits).scatter(-1, chosen.indices, scores)
    return (
        probs,
        torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen.indices, True),
        probs,
    )


def fused_topk_with_score_function_bwd(
    routing_map: Tensor, probs: Tensor, grad_probs: Tensor, grad_logits: Tensor, *more: Any
) -> None:
    """Into `grad_logits`."""
    inner = (grad_probs * probs).sum(-1, keepdim=True)
    grad_logits.copy_((grad_probs - inner) * probs * routing_map)


def fused_score_for_moe_aux_loss_fwd(
    *, logits: Tensor, topk: int, score_function: str, routing_map_format: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax over all experts, and which of them are chosen."""
    assert score_function == "softmax"
    scores = logits.float().softmax(-1)
    routing_map = torch.zeros_like(logits, dtype=torch.bool)
    return scores, routing_map.scatter(-1, logits.topk(topk, dim=-1).indices, True), scores


def fused_score_for_moe_aux_loss_bwd(
    *, intermediate_output: Tensor, grad_scores: Tensor, grad_logits: Tensor, **more: Any
) -> None:
    """Into `grad_logits`."""
    scores = intermediate_output
    inner = (grad_scores * scores).sum(-1, keepdim=True)
    grad_logits.copy_((grad_scores - inner) * scores)


def fused_moe_aux_loss_fwd(
    *,
    probs: Tensor,
    tokens_per_expert: Tensor,
    total_num_tokens: Any,
    num_experts: int,
    topk: int,
    coeff: float,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    """The balancing loss, and its factor."""
    factor = torch.as_tensor(num_experts * coeff / (topk * total_num_tokens**2))
    return (probs.sum(0) * tokens_per_expert).sum() * factor, factor


def fused_moe_aux_loss_bwd(
    *,
    Const_buf: Tensor,
    tokens_per_expert: Tensor,
    num_rows: int,
    num_cols: int,
    grad_aux_loss: Tensor,
) -> Tensor:
    """Of the probabilities, each token's the same."""
    return (grad_aux_loss * Const_buf * tokens_per_expert).expand(num_rows, num_cols).clone()


def get_cudnn_version() -> int:
    """9.20, which torch 2.13 comes with."""
    return 92000


def get_num_cublas_streams() -> int:
    """How many streams grouped products use."""
    return 1


class _Words(type):
    """A class of names: each is a word of its own, whatever it is."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


def module() -> types.ModuleType:
    """What `import transformer_engine_torch` is to give."""
    made = types.ModuleType("transformer_engine_torch")
    words = "NVTE_QKV_Layout NVTE_QKV_Format NVTE_Bias_Type NVTE_Mask_Type NVTE_Softmax_Type"
    for name in f"{words} CommOverlapType".split():
        setattr(made, name, _Words(name, (), {}))
    for name in "CommOverlap CommOverlapP2P CommOverlapHelper FP8TensorMeta".split():
        setattr(made, name, type(name, (), {}))
    made.DType = DType  # type: ignore[attr-defined]
    made.FP8FwdTensors = enum.IntEnum(  # type: ignore[attr-defined]
        "FP8FwdTensors",
        [f"GEMM{n}_{part}" for n in (1, 2, 3) for part in ("INPUT", "WEIGHT", "OUTPUT")],
        start=0,
    )
    made.FP8BwdTensors = enum.IntEnum(  # type: ignore[attr-defined]
        "FP8BwdTensors",
        [f"GRAD_{part}{n}" for n in (1, 2, 3) for part in ("OUTPUT", "INPUT")],
        start=0,
    )
    formats = enum.IntEnum("NVTERoutingMapFormat", ["BYTEMAP", "BITMAP_U8"], start=0)
    made.NVTERoutingMapFormat = formats  # type: ignore[attr-defined]
    made.NVTE_Fused_Attn_Backend = compiled_attention.Backend  # type: ignore[attr-defined]
    for source in (globals(), vars(compiled_attention), vars(compiled_fp8)):
        for name, value in source.items():
            if (
                isinstance(value, types.FunctionType)
                and name[0] != "_"
                and name not in ("module", "absent", "product")
            ):
                setattr(made, name, _counted(value))
    made.__getattr__ = absent  # type: ignore[method-assign]
    return made


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[function.__name__] += 1
        return function(*args, **kwargs)

    return counted


def absent(name: str) -> Callable[..., Any]:
    """A function in the place of one that no run of this project calls."""
    if name.startswith("__"):
        raise AttributeError(name)

    def absent_function(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"tests/te/compiled.py has no {name}")

    return absent_function
