"""What this project changes in mcore's layers: gradient mode, layer scale, drop path, routing."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.jit import jit_fuser
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

BiasDropoutAdd = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


class Layer(TransformerLayer):
    """mcore's layer, but its residual additions honour no_grad.

    mcore runs them under enable_grad, and a no_grad pass over weights that require gradients would
    then keep a graph, and with it every layer's activations.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        fuse_weight_gradients: bool = False,
        **kwargs: Any,
    ) -> None:
        """`fuse_weight_gradients`: its linear layers, TransformerEngine's, add into main_grad."""
        before, config.gradient_accumulation_fusion = (
            config.gradient_accumulation_fusion,
            fuse_weight_gradients,
        )
        super().__init__(config, *args, **kwargs)
        config.gradient_accumulation_fusion = before
        self.bias_dropout_add_exec_handler = nullcontext


class Experts(MoELayer):
    """mcore's layer of experts, but its dispatcher lets go of the routing when it is done.

    It would keep the routing probabilities until the layer's next pass, with their graph: in that
    the layer's recomputed input and, after the backward pass, the gradient of it.
    """

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """The last use of the dispatcher in a forward pass, also in a recomputed one."""
        output = super().postprocess(output, shared_expert_output)
        self.token_dispatcher.probs = self.token_dispatcher.routing_map = None
        return output


class BiasGeluMLP(MLP):
    """InternViT's MLP: mcore's, with bias and GELU in one kernel on a GPU.

    mcore's own fusion of the two has the tanh form, and without it they are two passes over the
    widest activations.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The output, and the bias that is still to be added."""
        wide, bias = self.linear_fc1(hidden_states)
        output: tuple[Tensor, Tensor] = self.linear_fc2(bias_gelu(wide, bias))
        return output


@jit_fuser
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU of x + bias, in the erf form."""
    return F.gelu(x + bias)


@jit_fuser
def scaled_add(x: Tensor, bias: Tensor | None, scale: Tensor, residual: Tensor) -> Tensor:
    """residual + (x + bias) * scale."""
    return torch.addcmul(residual, x if bias is None else x + bias, scale)


class LayerScaleAdd(nn.Module):
    """InternViT's residual addition, in the place of mcore's bias-dropout-add.

    residual + drop_path((x + bias) * scale): drop path leaves the branch out for whole tiles, in
    training, and scales up the others.
    """

    def __init__(
        self, *, hidden_size: int, init: float, drop_path_rate: float, dtype: torch.dtype
    ) -> None:
        super().__init__()
        assert 0.0 <= drop_path_rate < 1.0
        self.drop_path_rate = drop_path_rate
        self.scale = nn.Parameter(torch.full((hidden_size,), init, dtype=dtype))

    def forward(self, training: bool, fused: bool) -> BiasDropoutAdd:
        """The function that the layer applies; mcore asks for it in each call."""
        return self._add_dropped if training and self.drop_path_rate else self._add

    def _add(
        self, x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float
    ) -> Tensor:
        x, bias = x_with_bias
        return scaled_add(x, bias, self.scale, residual)

    def _add_dropped(
        self, x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float
    ) -> Tensor:
        x, bias = x_with_bias
        keep = 1.0 - self.drop_path_rate
        kept = torch.rand(x.size(0), 1, 1, device=x.device) < keep  # tiles come first in InternViT
        scale = self.scale * (kept / keep).to(x.dtype)
        return scaled_add(x, bias, scale, residual)
