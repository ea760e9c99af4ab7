"""Tiles of a step spread evenly over a replica's ranks; visual tokens go to the embedding.

Every tile is the same amount of work for the vision encoder, so equal counts are equal loads,
whatever the layout of the language model. Rank r of a replica encodes an unbroken run of the step's
tiles; each rank of the first pipeline stage receives the visual tokens of its part of the sequence,
in order, and the gradients travel the same way back. Who sends how much follows from plans and
streams, which every rank of the replica has.

Shapes: N tiles, V visual tokens, H channels of the language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megatron_vico.models.language_model import LanguageInputs
from megatron_vico.parallel.groups import Groups


@dataclass(frozen=True, kw_only=True)
class TileSplit:
    """Which tiles of a step each rank of the replica encodes."""

    starts: tuple[int, ...]
    """First tile of each rank, and at the end the number of tiles; one entry more than ranks."""

    rank: int
    """This rank's place in the replica."""

    @property
    def own(self) -> slice:
        """This rank's tiles."""
        return self.of(self.rank)

    def of(self, rank: int) -> slice:
        """A rank's tiles."""
        return slice(self.starts[rank], self.starts[rank + 1])


def split_tiles(units: Sequence[int], *, num_ranks: int, rank: int) -> TileSplit:
    """Cut a step's tiles into runs of equal length, as near as the units allow.

    Args:
        units: tiles of each thing that must stay on one rank, in order: 1 for each tile, or the
            tiles of each image where the router looks at whole images.
        num_ranks: ranks of the replica.
        rank: this one.

    Returns:
        The cut. Each boundary is the end of a unit nearest to the ideal one, so that with units of
        1 no two ranks differ by more than one tile.
    """
    ends = [0, *accumulate(units)]
    starts, unit = [0], 0
    for boundary in range(1, num_ranks):
        ideal = ends[-1] * boundary / num_ranks
        while unit + 1 < len(ends) and abs(ends[unit + 1] - ideal) <= abs(ends[unit] - ideal):
            unit += 1
        starts.append(ends[unit])
    return TileSplit(starts=(*starts, ends[-1]), rank=rank)


class TokenExchange:
    """Carries a pass's visual tokens to the first pipeline stage, and their gradients back."""

    def __init__(
        self,
        tokens_per_pack: Sequence[Tensor],
        inputs: Sequence[LanguageInputs],
        split: TileSplit,
        groups: Groups,
    ) -> None:
        """Work out who sends what.

        Args:
            tokens_per_pack: [N] int64 a pack, on the CPU: visual tokens of each of its tiles.
            inputs: of the packs whose tokens they are; they say which rank embeds which token.
            split: which rank encodes which tile.
            groups: process groups.
        """
        per_tile = torch.cat([*tokens_per_pack, torch.zeros(0, dtype=torch.int64)])
        self._group, self._rank, self._num_ranks = groups.replica, split.rank, len(split.starts) - 1
        made = [int(per_tile[split.of(rank)].sum()) for rank in range(self._num_ranks)]
        tensor_size, context_size = groups.language.tp.size(), groups.language.cp.size()
        sequence_size = sum(inputs[0].document_lens) // inputs[0].shard_len // context_size
        self._embeds = range(tensor_size * context_size)
        """Ranks of the replica that embed tokens."""
        # Without sequence parallelism all tensor-parallel ranks embed, and have gradients of, the
        # same tokens.
        self._answers = self._embeds if sequence_size > 1 else self._embeds[::tensor_size]
        """Those of them whose gradients go back; one for each token."""

        def embedded_by(rank: int, shard_V: Tensor) -> Tensor:
            context, tensor = divmod(rank, tensor_size)
            return shard_V == context * sequence_size + (tensor if sequence_size > 1 else 0)

        shard_V = torch.cat([each.visual_shard_V for each in inputs])
        assert len(shard_V) == sum(made), "as many visual tokens in the streams as of the tiles"
        own_V = shard_V.split(made)[self._rank]
        self._own = len(own_V)
        self._sent = [embedded_by(rank, own_V).nonzero().squeeze(1) for rank in self._embeds]
        """[V] int64 for each rank that embeds: which of this rank's tokens it gets."""
        self._receives, self._of_pack = [0] * self._num_ranks, list[int]()
        if self._rank in self._embeds:
            parts = shard_V.split(made)
            self._receives = [int(embedded_by(self._rank, part).sum()) for part in parts]
            self._of_pack = [
                int(embedded_by(self._rank, each.visual_shard_V).sum()) for each in inputs
            ]

    def deliver(self, tokens_VH: Tensor) -> Tensor | None:
        """Bring visual tokens to the ranks that embed them; called by the whole replica.

        Args:
            tokens_VH: [V, H], of this rank's tiles, without a graph.

        Returns:
            [V, H] on the first pipeline stage, what this rank embeds of all packs, one after the
            other (`packs`); elsewhere None.
        """
        assert len(tokens_VH) == self._own, "one row a visual token of this rank's tiles"
        if self._num_ranks == 1:
            return tokens_VH
        index = torch.cat(self._sent).to(tokens_VH.device, non_blocking=True)
        sends = [len(each) for each in self._sent]
        sends += [0] * (self._num_ranks - len(sends))
        received = self._all_to_all(tokens_VH.index_select(0, index), sends, self._receives)
        return received if self._rank in self._embeds else None

    def packs(self, received_VH: Tensor) -> Sequence[Tensor]:
        """What `deliver` gave, a view [V, H] for each pack."""
        return received_VH.split(self._of_pack)

    def give_back(self, grad_VH: Tensor | None, *, like: Tensor) -> Tensor:
        """Bring the gradients to the ranks that made the tokens; called by the whole replica.

        Args:
            grad_VH: [V, H], of what `deliver` gave; None where it gave None.
            like: of their width, dtype and device.

        Returns:
            [V, H], the gradient of what this rank gave to `deliver`.
        """
        if self._num_ranks == 1:
            assert grad_VH is not None
            return grad_VH
        # Also a rank without tokens or gradients takes part: the exchange is a collective.
        answers = self._rank in self._answers
        sent = grad_VH if grad_VH is not None and answers else like.new_zeros(0, like.size(1))
        sends = self._receives if answers else [0] * self._num_ranks
        index = [self._sent[rank] for rank in self._answers]
        receives = [0] * self._num_ranks
        for rank, each in zip(self._answers, index, strict=True):
            receives[rank] = len(each)
        received = self._all_to_all(sent, sends, receives)
        where = torch.cat(index).to(like.device, non_blocking=True)
        return like.new_empty(self._own, like.size(1)).index_copy(0, where, received)

    def _all_to_all(self, sent: Tensor, sends: list[int], receives: list[int]) -> Tensor:
        received = sent.new_empty(sum(receives), sent.size(1))
        torch.distributed.all_to_all_single(
            received, sent.contiguous(), receives, sends, group=self._group
        )
        return received
