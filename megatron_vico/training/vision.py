"""First and last phase of a step: tiles to visual tokens, and gradients back through the encoder.

Each rank encodes its own tiles (parallel/tile_parallel.py). Visual tokens enter the language model
without the encoder's graph, so that the encoder's backward pass is separate from the language
model's, and its memory too.

Shapes: N tiles, P patches of a tile, D channels of the ViT, V visual tokens, H channels of the
language model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.models.language_model import LanguageInputs
from megatron_vico.parallel.batch import StepBatch
from megatron_vico.parallel.groups import Groups
from megatron_vico.parallel.tile_parallel import TokenExchange
from megatron_vico.training.profiler import phase


def tile_features(
    encoder: VisionEncoder, batch: StepBatch, device: torch.device, *, chunk_tiles: int
) -> Tensor:
    """ViT outputs of this rank's tiles, `chunk_tiles` at a time, without a graph.

    Returns:
        [N, P, D], patch features without the class token.
    """
    with phase("encode"), torch.no_grad():
        chunks = _on_device(batch, device, chunk_tiles=chunk_tiles)
        return torch.cat([encoder.features(encoder.normalise(chunk)) for chunk in chunks])


def _on_device(batch: StepBatch, device: torch.device, *, chunk_tiles: int) -> list[Tensor]:
    return [chunk.to(device, non_blocking=True) for chunk in batch.tiles.split(chunk_tiles)]


class VisualTokens:
    """Visual tokens of all packs of a step under one plan each, cut from the encoder's graph."""

    def __init__(
        self, outputs: Sequence[Tensor], exchange: TokenExchange, *, trained: bool
    ) -> None:
        """Deliver tokens; called by every rank of the replica.

        Args:
            outputs: [V, H] a chunk of this rank's tiles, each with a graph of its own if the
                encoder is trained.
            exchange: the way to the ranks that embed tokens.
            trained: whether gradients will be carried back.
        """
        self._outputs, self._exchange = list(outputs) if trained else [], exchange
        outputs_VH = torch.cat([each.detach() for each in outputs])
        with phase("deliver tokens"):
            self._received_VH = exchange.deliver(outputs_VH)
        self._packs = None if self._received_VH is None else exchange.packs(self._received_VH)
        self._awaited = set[int]()
        """Packs whose gradients have yet to come."""
        if trained and self._packs is not None:
            self._awaited = {index for index, each in enumerate(self._packs) if len(each)}
            self._leaf = outputs_VH.new_zeros((), requires_grad=True)

    def of(self, index: int) -> Tensor | None:
        """[V, H] of one pack that this rank embeds; None beyond the first pipeline stage."""
        if self._packs is None or index not in self._awaited:
            return None if self._packs is None else self._packs[index]
        tokens: Tensor = _Exchanged.apply(self._leaf, self._packs[index])
        tokens.register_hook(lambda _: self._awaited.discard(index))
        return tokens

    def backward(self) -> None:
        """Carry the language model's gradients back through the encoder; every rank calls it."""
        assert not self._awaited, f"packs {self._awaited} have tokens, but no gradient came"
        lens = [len(each) for each in self._outputs]
        with phase("return gradients"):
            like = self._outputs[0].detach()
            grad_VH = self._exchange.give_back(self._received_VH, like=like)
        self._received_VH = self._packs = None
        with phase("encoder backward"):
            # One pass a chunk: only its activations exist, and gradients of weights are added up in
            # DDP's buffers, in their precision, not by autograd in that of the weights.
            for grad in grad_VH.split(lens):
                output = self._outputs.pop(0)
                if output.requires_grad:
                    torch.autograd.backward(output, grad)


class _Exchanged(torch.autograd.Function):
    """Tokens whose gradient takes their place: nothing reads them after the embedding."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, tokens_VH: Tensor) -> Tensor:
        """`leaf` is there to make the result require a gradient."""
        ctx.tokens_VH = tokens_VH
        return tokens_VH.detach()

    @staticmethod
    def backward(ctx: Any, grad_VH: Tensor) -> tuple[None, None]:
        # `data` has no version counter: the embedding of a pack under way keeps its tokens, of the
        # same buffer, for their shape.
        ctx.tokens_VH.data.copy_(grad_VH)
        return None, None


def visual_tokens(
    encoder: VisionEncoder,
    batch: StepBatch,
    plans: Sequence[Tensor] | None,
    *,
    inputs: Sequence[LanguageInputs],
    features_NPD: Tensor | None,
    chunk_tiles: int,
    trained: bool,
    groups: Groups,
) -> VisualTokens:
    """Encode a step's tiles under a plan for each pack; called by every rank of the replica.

    Where gradients will come back, nothing is kept of what lies between a chunk of tiles (or their
    features) and its tokens: it is computed again in the backward pass.

    Args:
        encoder: its connectors are used, and its ViT if there are no features yet.
        batch: the step.
        plans: [N] bool a pack, on the CPU, True = compressed; None: nothing is.
        inputs: the streams that go with the plans, an entry a pack.
        features_NPD: ViT outputs of this rank's tiles; None, they are made here, chunk by chunk.
        chunk_tiles: tiles of a chunk.
        trained: whether gradients will be carried back.
        groups: process groups.
    """
    if plans is None:
        plans = [torch.zeros(pack.num_tiles, dtype=torch.bool) for pack in batch.packs]
    compressed_N = torch.cat(list(plans))[batch.split.own]

    def encoded(chunk: Tensor, compressed: Tensor) -> Tensor:
        features = chunk if features_NPD is not None else encoder.features(encoder.normalise(chunk))
        return encoder.visual_tokens(features, compressed)

    if features_NPD is None:
        chunks = _on_device(batch, groups.device, chunk_tiles=chunk_tiles)
    else:
        chunks = list(features_NPD.split(chunk_tiles))
    pairs = zip(chunks, compressed_N.split(chunk_tiles), strict=True)
    with phase("encode"), torch.set_grad_enabled(trained):
        # The checkpoint also keeps the random state: a chunk that is computed again drops the same
        # paths. It stops when it has the last tensor it wants, in the connector: stopped inside a
        # layer, mcore's would hold on to the chunk's graph.
        outputs = [
            checkpoint(encoded, *pair, use_reentrant=False) if trained else encoded(*pair)
            for pair in pairs
        ]
    counts = [encoder.tokens_per_tile(plan) for plan in plans]
    exchange = TokenExchange(counts, inputs, batch.split, groups)
    return VisualTokens(outputs, exchange, trained=trained)
