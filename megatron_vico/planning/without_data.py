"""What of a step resists tensors without values, and what stands for it: for the rest of a process.

Attention and experts are a GPU's: one kernel for all documents of a pack, one product for all
experts, where torch's own layers loop. Routing is balanced: each expert gets the same tokens.
"""

import functools
from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vico import cpu_stand_in
from megatron_vico.models import attention
from megatron_vico.planning.meter import Meter, site
from megatron_vico.training import pipeline_schedule, router_step, setup, vision

aten = torch.ops.aten


Kernels = Literal["gpu", "torch"]
"""As TransformerEngine allocates and as models/build.py fuses on a GPU; or as torch on a CPU."""


def install(
    meter: Meter, *, experts_per_token: int, shared: bool = True, kernels: Kernels = "gpu"
) -> None:
    """Let a step run on "meta" within the meter; replaces functions of torch and of others.

    `shared`: the reference starts as the policy does, and shares what is frozen. With the kernels
    of torch it is to be compared with a real run on CPUs.
    """
    meter.answers[aten.masked_select.default] = lambda tensor, mask: (
        # Only mcore's permutation asks: which tokens each of the experts [E, T] gets.
        tensor.new_empty(mask.size(1) * experts_per_token)
    )
    meter.answers[aten.equal.default] = lambda *tensors: shared
    torch.cuda.synchronize = lambda *args: meter.add_wait("torch.cuda.synchronize")
    _see_numbers_sent(meter)
    watch(meter, kernels=kernels)
    _balance_experts(meter)
    _read_no_norms()
    _ask_as_many_questions(meter)
    setup.HostOffload = _Away  # type: ignore[assignment,misc]
    if kernels == "gpu":
        _attend_at_once(meter)
        _group_experts(meter)
        F.rms_norm = lambda x, shape, weight, eps: _RMSNorm.apply(x, weight)  # type: ignore
        _fuse_activations()
        cpu_stand_in.adamw = lambda *args, **kwargs: None  # in place


def watch(meter: Meter, *, kernels: Kernels) -> None:
    """Tell the meter of passes and attention; what a real run needs too.

    FLOPs of attention are those of its documents, which no operator knows.
    """
    F.scaled_dot_product_attention = functools.partial(_attend, meter, kernels)
    schedule, make_room = pipeline_schedule._schedule, vision.VisualTokens.__init__

    def room(self: Any, *args: Any, **kwargs: Any) -> None:
        with meter.building("visual tokens"):
            make_room(self, *args, **kwargs)

    vision.VisualTokens.__init__ = room  # type: ignore[method-assign]

    def named(step: Any, run: Any, **kwargs: Any) -> Any:
        with meter.span(f"{run.name.split()[0]} pass"):
            return schedule(step, run, **kwargs)

    pipeline_schedule._schedule = named


def _read_no_norms() -> None:
    from megatron.core.optimizer import clip_grads

    # mcore's own gathers the norms of all tensors as numbers; on a GPU a kernel of
    # TransformerEngine's reads none.
    clip_grads.l2_norm_impl = lambda chunk, overflow, lists, per_tensor: (
        lists[0][0].new_empty(1, dtype=torch.float32),
        None,
    )


def _ask_as_many_questions(meter: Meter) -> None:
    def gather(ratio_M: Tensor, packs: Any, groups: Any) -> Tensor:
        # The one length in a step that other ranks have to tell: here all have as many.
        count = torch.empty(1, dtype=torch.int64, device=ratio_M.device)
        sizes = [torch.empty_like(count) for _ in range(groups.dp_size)]
        torch.distributed.all_gather(sizes, count, group=groups.data_parallel)
        for _ in sizes:
            meter.add_wait("questions of each replica in training/router_step.py")
        placed_M2 = ratio_M.new_empty(len(ratio_M), 2)
        gathered = [torch.empty_like(placed_M2) for _ in sizes]
        torch.distributed.all_gather(gathered, placed_M2, group=groups.data_parallel)
        return torch.cat(gathered)[:, 0]

    alone = router_step._gather
    router_step._gather = lambda ratio_M, packs, groups: (
        alone(ratio_M, packs, groups) if groups.dp_size == 1 else gather(ratio_M, packs, groups)
    )


def _balance_experts(meter: Meter) -> None:
    """Counts of each expert's tokens are real and on the host, as after mcore's copy."""
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    preprocess, wait = (
        MoEAlltoAllTokenDispatcher.preprocess,
        MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize,
    )
    gather = token_dispatcher.gather_from_sequence_parallel_region
    routed: dict[tuple[int, int], _Balanced] = {}

    def balanced(self: Any, routing_map: Tensor) -> Tensor:
        shape = (routing_map.size(0), routing_map.size(1))
        if shape not in routed:
            routed[shape] = _Balanced(balanced_map(*shape, self.config.moe_router_topk))
        counts: Tensor = preprocess(self, routed[shape])
        return counts

    def gathered(tensor: Tensor, group: Any = None, **kwargs: Any) -> Tensor:
        if tensor.is_meta:
            return gather(tensor, group=group, **kwargs)
        gather(tensor.to("meta"), group=group, **kwargs)
        return tensor.repeat(group.size())  # the others have as many tokens

    def counted(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
        if point == self.cuda_sync_point:
            meter.add_wait("tokens of each expert in megatron-core's dispatcher")
        return wait(self, point, tokens_per_expert)

    MoEAlltoAllTokenDispatcher.preprocess = balanced
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = counted
    token_dispatcher.gather_from_sequence_parallel_region = gathered


class _Balanced:
    """What mcore asks of a map [T, E] of tokens to experts, which is summed once."""

    def __init__(self, routing_map: Tensor) -> None:
        self._shape, self._counts_E = routing_map.shape, routing_map.sum(dim=0)

    def size(self, dim: int) -> int:
        return self._shape[dim]

    def sum(self, dim: int) -> Tensor:
        assert dim == 0
        return self._counts_E


def balanced_map(num_tokens: int, num_experts: int, experts_per_token: int) -> Tensor:
    """[T, E] bool, which experts each token goes to: all get the same, but for a remainder."""
    chosen = torch.arange(num_tokens * experts_per_token) % num_experts
    empty = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
    return empty.scatter_(1, chosen.view(num_tokens, experts_per_token), value=True)


def _attend(
    meter: Meter,
    kernels: Kernels,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **named: Any,
) -> Tensor:
    """Torch's attention: of its kernels it would take the one that has all scores on "meta"."""
    scale = named.get("scale")
    pairs = q.size(2) * k.size(2) / (2 if is_causal else 1)
    if kernels == "gpu" and attn_mask is None:
        return _flash(meter, q, k, v, pairs, causal=is_causal, scale=scale)
    if attn_mask is not None:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype)  # what is added to the scores
    out = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return _counted(meter, out, 4 * q.size(0) * q.size(1) * pairs * q.size(-1))


def _flash(
    meter: Meter,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pairs: float,
    *,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """A GPU's kernel, which keeps queries, keys, values and output; `pairs` attend."""
    out = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[0]
    return _counted(meter, out, 4 * q.size(0) * q.size(1) * pairs * q.size(-1))


def _counted(meter: Meter, out: Tensor, flops: float) -> Tensor:
    meter.add_flops(flops)
    if not out.requires_grad:
        return out
    # Five products for the two of the forward pass.
    counted: Tensor = _CountBackward.apply(out, meter, 2.5 * flops)
    return counted


def _attend_at_once(meter: Meter) -> None:
    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        layout = packed_seq_params
        if layout.context is not None:
            return loop(self, query, key, value, attention_mask, packed_seq_params=layout)
        query = attention.rotate(query, layout.cos, layout.sin)
        key = attention.rotate(key, layout.cos, layout.sin)
        q, k, v = (each.transpose(0, 1)[None] for each in (query, key, value))
        pairs = sum(length**2 for length in layout.document_lens) / 2
        out = _flash(meter, q, k, v, pairs, causal=True, scale=self.scale)
        return out[0].transpose(0, 1).flatten(1)

    loop = attention.SDPACoreAttention.forward
    attention.SDPACoreAttention.forward = forward  # type: ignore[method-assign]


def _group_experts(meter: Meter) -> None:
    from megatron.core.transformer.moe.experts import SequentialMLP

    def forward(self: Any, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> Any:
        first, second = (
            [getattr(each, name).weight for each in self.local_experts]
            for name in ("linear_fc1", "linear_fc2")
        )
        hidden = _Grouped.apply(meter, tokens, *first)
        return _Grouped.apply(meter, _WeightedSwiGLU.apply(hidden, probs), *second), None

    SequentialMLP.forward = forward


def _see_numbers_sent(meter: Meter) -> None:
    """Numbers that become a tensor of the device: no operator says that they are copied."""
    make = torch.tensor

    def tensor(data: Any, *args: Any, **kwargs: Any) -> Tensor:
        made = make(data, *args, **kwargs)
        if made.is_meta:
            meter.add_wait(f"torch.tensor at {site()}")
        return made

    torch.tensor = tensor


def _fuse_activations() -> None:
    plain = setup.language_transformer_config

    def fused(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **{"bias_activation_fusion": True, **kwargs})

    setup.language_transformer_config = fused


class _Away:
    """Weights that `HostOffload` keeps on the host, where a tensor of "meta" cannot go."""

    def __init__(self, params: Iterable[nn.Parameter], device: torch.device) -> None:
        self._shapes = [(param, param.shape) for param in params]
        self.release()

    def fetch(self) -> None:
        for param, shape in self._shapes:
            param.data = param.data.new_empty(shape)

    def ready(self) -> None:
        if not all(param.shape == shape for param, shape in self._shapes):
            self.fetch()

    def release(self) -> None:
        for param, _ in self._shapes:
            param.data = param.data.new_empty(0)


class _Grouped(torch.autograd.Function):
    """Tokens of several experts, sorted, each by its own matrix."""

    @staticmethod
    def forward(ctx: Any, meter: Meter, tokens: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, *weights)
        ctx.meter, ctx.flops = meter, 2 * tokens.size(0) * weights[0].numel()
        meter.add_flops(ctx.flops)
        return tokens.new_empty(tokens.size(0), weights[0].size(0))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        tokens, *weights = ctx.saved_tensors
        of_weights = [torch.empty_like(w) if w.requires_grad else None for w in weights]
        ctx.meter.add_flops(ctx.flops * (1 + (of_weights[0] is not None)))
        return None, torch.empty_like(tokens), *of_weights


class _WeightedSwiGLU(torch.autograd.Function):
    """silu(gate) * up * probability in one kernel, which keeps its inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probs: Tensor) -> Tensor:
        ctx.save_for_backward(x, probs)
        return x.new_empty(x.size(0), x.size(1) // 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, probs = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(probs)


class _RMSNorm(torch.autograd.Function):
    """One kernel that keeps its input, where torch's on "meta" keeps two float32 copies of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x.contiguous(), weight, scale)  # a slice of QKV becomes a copy
        return x.new_empty(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class _CountBackward(torch.autograd.Function):
    """Passes through; its backward pass counts FLOPs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, meter: Meter, flops: float) -> Tensor:
        ctx.meter, ctx.flops = meter, flops
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.meter.add_flops(ctx.flops)
        return grad, None, None
