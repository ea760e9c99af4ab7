"""First and last phase of a step: tiles to visual tokens, and gradients back through the encoder.

Each rank encodes its own tiles (parallel/tile_parallel.py). Visual tokens enter the language model
as leaf tensors, so that the encoder's backward pass is separate from the language model's, and its
memory too.

Shapes: N tiles, P patches of a tile, D channels of the ViT, V visual tokens, H channels of the
language model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.parallel.batch import StepBatch
from megatron_vico.parallel.groups import Groups
from megatron_vico.parallel.tile_parallel import TokenExchange
from megatron_vico.training.profiler import phase


def tile_features(
    encoder: VisionEncoder, batch: StepBatch, device: torch.device, *, chunk_tiles: int
) -> Tensor:
    """ViT outputs of this rank's tiles, `chunk_tiles` at a time.

    Where the ViT is trained, only the features are kept for the backward pass; what lies between is
    computed again chunk by chunk.

    Returns:
        [N, P, D], patch features without the class token.
    """

    def features(tiles_N3SS: Tensor) -> Tensor:
        return encoder.features(encoder.normalise(tiles_N3SS))

    trained = any(param.requires_grad for param in encoder.vit.parameters())
    with phase("encode"):
        chunks = [chunk.to(device, non_blocking=True) for chunk in batch.tiles.split(chunk_tiles)]
        if not trained:
            with torch.no_grad():
                return torch.cat([features(chunk) for chunk in chunks])
        # Also keeps the random state, so that a chunk that is computed again drops the same paths.
        return torch.cat([checkpoint(features, chunk, use_reentrant=False) for chunk in chunks])


class VisualTokens:
    """Visual tokens of all packs of a step under one plan each, cut from the encoder's graph."""

    def __init__(self, outputs_VH: Tensor, exchange: TokenExchange, *, trained: bool) -> None:
        """Deliver tokens; called by every rank of the replica.

        Args:
            outputs_VH: what the encoder made of this rank's tiles, with its graph if it is trained.
            exchange: the way to the ranks that embed tokens.
            trained: whether gradients will be carried back.
        """
        self._outputs_VH, self._exchange = outputs_VH, exchange
        with phase("deliver tokens"):
            delivered = exchange.deliver(outputs_VH.detach())
        self._grad_VH: Tensor | None = None
        self.leaves: Sequence[Tensor] | None = None
        """[V, H] a pack, what the language model sees, on the first pipeline stage; elsewhere
        None."""
        if delivered is None:
            return
        self.leaves = delivered
        if trained:
            # One buffer for all gradients: autograd adds into it, and it travels back as it is.
            self._grad_VH = outputs_VH.new_zeros(
                sum(len(leaf) for leaf in delivered), outputs_VH.size(1)
            )
            grads = self._grad_VH.split([len(leaf) for leaf in delivered])
            self.leaves = [leaf.detach().requires_grad_() for leaf in delivered]
            for leaf, grad in zip(self.leaves, grads, strict=True):
                leaf.grad = grad

    def of(self, index: int) -> Tensor | None:
        """The tokens of one pack; None beyond the first pipeline stage."""
        return None if self.leaves is None else self.leaves[index]

    def backward(self) -> None:
        """Carry the language model's gradients back through the encoder; every rank calls it."""
        with phase("return gradients"):
            grad_VH = self._exchange.give_back(self._grad_VH, like=self._outputs_VH)
        with phase("encoder backward"):
            if self._outputs_VH.requires_grad:
                torch.autograd.backward(self._outputs_VH, grad_VH)


def visual_tokens(
    encoder: VisionEncoder,
    features_NPD: Tensor,
    batch: StepBatch,
    plans: Sequence[Tensor] | None,
    *,
    trained: bool,
    groups: Groups,
) -> VisualTokens:
    """Encode a step's tiles under a plan for each pack; called by every rank of the replica.

    Args:
        encoder: its connectors are used.
        features_NPD: ViT outputs of this rank's tiles.
        batch: the step.
        plans: [N] bool a pack, on the CPU, True = compressed; None: nothing is.
        trained: whether gradients will be carried back.
        groups: process groups.
    """
    if plans is None:
        plans = [torch.zeros(pack.num_tiles, dtype=torch.bool) for pack in batch.packs]
    compressed_N = torch.cat(list(plans))[batch.split.own]
    with phase("encode"), torch.set_grad_enabled(trained):
        outputs_VH = encoder.visual_tokens(
            features_NPD if trained else features_NPD.detach(), compressed_N
        )
    exchange = TokenExchange([encoder.tokens_per_tile(plan) for plan in plans], batch.split, groups)
    return VisualTokens(outputs_VH, exchange, trained=trained)
