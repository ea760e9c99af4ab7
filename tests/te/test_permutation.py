"""TransformerEngine's fused permutation of experts' tokens, in Triton's interpreter, equals
megatron-core's own."""

import torch
from megatron.core.transformer.moe.moe_utils import permute, unpermute
from torch import Tensor

from megatron_vico.config.registry import get_model_config
from megatron_vico.models.build import language_transformer_config

TOKENS, EXPERTS, WIDTH = 9, 4, 16


def there_and_back(*, fused: bool) -> list[Tensor]:
    """Permuted tokens and probabilities, tokens that are back, and both gradients."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randn(TOKENS, EXPERTS, generator=generator).topk(2).indices
    routing_map = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, chosen, True)
    tokens = torch.randn(TOKENS, WIDTH, generator=generator).requires_grad_()
    probs = (torch.rand(TOKENS, EXPERTS, generator=generator) * routing_map).requires_grad_()
    permuted, permuted_probs, places, *_ = permute(
        tokens, routing_map, probs=probs, num_out_tokens=2 * TOKENS, fused=fused
    )
    weighted = permuted * permuted_probs[:, None]
    back = unpermute(
        weighted, places, restore_shape=tokens.shape, routing_map=routing_map, fused=fused
    )
    (back * torch.randn(back.shape, generator=generator)).sum().backward()
    return [permuted, permuted_probs, back, tokens.grad, probs.grad]


def test_fused_permutation_equals_the_other() -> None:
    for found, expected in zip(
        there_and_back(fused=True), there_and_back(fused=False), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_models_of_experts_take_fused_permutation_and_routing() -> None:
    config = language_transformer_config(get_model_config("toy-moe"))
    assert config.moe_permute_fusion
    assert config.moe_router_fusion
