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
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import checkpoint

from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.models.language_model import LanguageInputs
from megatron_vico.models.to_device import to_device
from megatron_vico.parallel.batch import StepBatch
from megatron_vico.parallel.groups import Groups
from megatron_vico.parallel.tile_parallel import TokenExchange
from megatron_vico.training.profiler import phase


def tile_features(
    encoder: VisionEncoder, batch: StepBatch, device: torch.device, *, chunk_tiles: int
) -> Tensor:
    """ViT outputs [N, P, D] of this rank's tiles, `chunk_tiles` at a time, without a graph."""
    vision = encoder.model.vision
    features_NPD = torch.empty(
        *(len(batch.tiles), vision.num_patches, vision.hidden_size),
        dtype=encoder.config.params_dtype,
        device=device,
    )
    with phase("encode"), torch.no_grad():
        # Into their place, and tiles to the device when it is their turn: nothing is held twice.
        pairs = zip(features_NPD.split(chunk_tiles), batch.tiles.split(chunk_tiles), strict=True)
        for place, tiles in pairs:
            place.copy_(encoder.features(encoder.normalise(to_device(tiles, device))))
    return features_NPD


class VisualTokens:
    """Visual tokens of all packs of a step under one plan each, cut from the encoder's graph."""

    def __init__(self, exchange: TokenExchange, *, like: Tensor, trained: bool) -> None:
        """Room for tokens `like` these, [0, H]; every rank of the replica then calls `deliver`."""
        self._exchange, self._like, self._trained = exchange, like, trained
        self._chunks = list[GradientEdge | None]()
        """The way back into the graph of each chunk of this rank's tiles."""
        self._awaited = set[int]()
        """Packs whose gradients have yet to come."""
        self._received_VH: Tensor | None = None
        self._packs: Sequence[Tensor] | None = None
        if exchange.of_pack is not None:
            self._received_VH = like.new_empty(sum(exchange.of_pack), like.size(1))
            self._packs = self._received_VH.split(exchange.of_pack)
            if trained:
                self._awaited = {index for index, each in enumerate(self._packs) if len(each)}
                self._leaf = like.new_zeros((), requires_grad=True)

    def deliver(self, turn: int, tokens_VH: Tensor) -> None:
        """Send [V, H] of a chunk of this rank's tiles to where they are embedded.

        Of `tokens_VH` only the way back into its graph is kept, not its values.
        """
        with phase("deliver tokens"):
            self._exchange.deliver(turn, tokens_VH.detach(), self._received_VH)
        if self._trained:
            has_graph = tokens_VH.requires_grad  # not without tiles
            self._chunks.append(get_gradient_edge(tokens_VH) if has_graph else None)

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
        for turn, edge in enumerate(self._chunks):
            self._chunks[turn] = None
            with phase("return gradients"):
                grad_VH = self._exchange.give_back(turn, self._received_VH, like=self._like)
            # One pass a chunk: only its activations exist, and gradients of weights are added up in
            # DDP's buffers, in their precision, not by autograd in that of the weights.
            with phase("encoder backward"):
                if edge is not None:
                    torch.autograd.backward(edge, grad_VH)
        self._received_VH = self._packs = None


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
    plans: Sequence[Tensor],
    *,
    inputs: Sequence[LanguageInputs],
    features_NPD: Tensor | None,
    chunk_tiles: int,
    trained: bool,
    groups: Groups,
) -> VisualTokens:
    """Encode a step's tiles under a plan for each pack; called by every rank of the replica.

    Where gradients will come back (`trained`), nothing is kept of what lies between a chunk of
    tiles (or their features) and its tokens: it is computed again in the backward pass.

    Args:
        plans: [N] bool a pack, on the CPU, True = compressed.
        inputs: the streams that go with the plans, an entry a pack.
        features_NPD: ViT outputs of this rank's tiles; None, they are made here, chunk by chunk.
    """
    compressed_N = torch.cat(list(plans))[batch.split.own]
    device = groups.device

    def encoded(chunk: Tensor, compressed: Tensor, _on_device: Tensor) -> Tensor:
        if features_NPD is not None:
            return encoder.visual_tokens(chunk, compressed)
        tiles = encoder.normalise(to_device(chunk, device))
        return encoder.visual_tokens(encoder.features(tiles), compressed)

    counts = [encoder.tokens_per_tile(plan) for plan in plans]
    exchange = TokenExchange(counts, inputs, batch.split, groups, chunk_tiles=chunk_tiles)
    width, dtype = encoder.model.language.hidden_size, encoder.config.params_dtype
    like = torch.empty(0, width, dtype=dtype, device=device)
    tokens = VisualTokens(exchange, like=like, trained=trained)
    source = batch.tiles if features_NPD is None else features_NPD
    for turn in range(batch.split.num_turns(chunk_tiles)):
        own = slice(turn * chunk_tiles, (turn + 1) * chunk_tiles)  # nothing, where others have more
        chunk = source[own], compressed_N[own], like
        with phase("encode"), torch.set_grad_enabled(trained):
            # The checkpoint also keeps the random state, of the devices that its arguments are on:
            # a chunk that is computed again drops the same paths. It stops when it has the last
            # tensor it wants, in the connector: stopped inside a layer, mcore's would hold on to
            # the chunk's graph.
            of_chunk = (
                checkpoint(encoded, *chunk, use_reentrant=False) if trained else encoded(*chunk)
            )
        tokens.deliver(turn, of_chunk)
        del of_chunk
    return tokens
