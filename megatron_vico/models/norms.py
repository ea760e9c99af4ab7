"""Normalisations for mcore's local layers: plain torch, and right under sequence parallelism.

mcore's own torch norm refuses sequence parallelism, because nothing would sum its weight's gradient
over the ranks that share a sequence. Marking the weight makes mcore's `finalize_model_grads` do
that.
"""

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch's, built as mcore's layer specs build norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config)


class LayerNorm(nn.LayerNorm):
    """torch's, built as mcore's layer specs build norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config)


class AllHeadsRMSNorm(RMSNorm):
    """RMSNorm of queries or keys over all heads together (InternViT-6B), not head by head."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(config, hidden_size * config.num_attention_heads, eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., heads, channels of a head] over its last two dimensions."""
        return super().forward(x.flatten(-2)).view(x.shape)


def _mark(norm: nn.Module, config: TransformerConfig) -> None:
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
