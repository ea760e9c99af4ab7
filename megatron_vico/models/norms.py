"""Normalisations for mcore's local layers: plain torch, and right under sequence parallelism.

mcore's own torch norm refuses sequence parallelism, because nothing would sum its weight's gradient
over the ranks that share a sequence. Marking the weight makes mcore's `finalize_model_grads` do
that.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; built as mcore's layer specs build norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(torch.ones(hidden_size, dtype=config.params_dtype), config)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each vector of the last dimension."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension; built as mcore's layer specs build norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(torch.ones(hidden_size, dtype=config.params_dtype), config)
        self.bias = _parameter(torch.zeros(hidden_size, dtype=config.params_dtype), config)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each vector of the last dimension."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class AllHeadsRMSNorm(RMSNorm):
    """RMSNorm of queries or keys over all heads together (InternViT-6B), not head by head."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(config, hidden_size * config.num_attention_heads, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., heads, channels of a head] over its last two dimensions."""
        return super().forward(x.flatten(-2)).view(x.shape)


def _parameter(value: Tensor, config: TransformerConfig) -> nn.Parameter:
    parameter = nn.Parameter(value)
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter
