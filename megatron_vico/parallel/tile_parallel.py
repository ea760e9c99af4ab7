"""Tiles of a step spread evenly over a replica's ranks; visual tokens go to the embedding.

Every tile is the same amount of work for the vision encoder, so equal counts are equal loads,
whatever the layout of the language model. Rank r of a replica encodes an unbroken run of the step's
tiles; the ranks of the first pipeline stage receive the visual tokens of all tiles in order, and
the gradients travel the same way back. Who sends how much follows from the plans, which every rank
of the replica has.

Shapes: N tiles, V visual tokens, H channels of the language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

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

    def __init__(self, tokens_per_pack: Sequence[Tensor], split: TileSplit, groups: Groups) -> None:
        """Work out who sends how much.

        Args:
            tokens_per_pack: [N] int64 a pack, on the CPU: visual tokens of each of its tiles.
            split: which rank encodes which tile.
            groups: process groups.
        """
        per_tile = torch.cat([*tokens_per_pack, torch.zeros(0, dtype=torch.int64)])
        self._of_pack = [int(each.sum()) for each in tokens_per_pack]
        self._group, self._rank, self._num_ranks = groups.replica, split.rank, len(split.starts) - 1
        self._of_rank = [int(per_tile[split.of(rank)].sum()) for rank in range(self._num_ranks)]
        tensor_size = groups.language.tp.size()
        self._embeds = range(tensor_size * groups.language.cp.size())
        """Ranks of the replica that embed tokens."""
        # All tensor-parallel ranks have the same gradients, each context rank a part of the sum.
        self._answers = range(0, len(self._embeds), tensor_size)
        """Those of them whose gradients go back."""

    def deliver(self, tokens_VH: Tensor) -> list[Tensor] | None:
        """Bring the step's visual tokens to the ranks that embed them; called by the whole replica.

        Args:
            tokens_VH: [V, H], of this rank's tiles, without a graph.

        Returns:
            [V, H] a pack on the first pipeline stage, views of one buffer; elsewhere None.
        """
        assert len(tokens_VH) == self._of_rank[self._rank], (
            "one row a visual token of this rank's tiles"
        )
        received = tokens_VH
        if self._num_ranks > 1:
            sends = [
                len(tokens_VH) if rank in self._embeds else 0 for rank in range(self._num_ranks)
            ]
            receives = self._of_rank if self._rank in self._embeds else [0] * self._num_ranks
            # Tensor and context ranks of the first stage each embed, so each gets all tokens.
            received = self._all_to_all(torch.cat([tokens_VH] * len(self._embeds)), sends, receives)
        return list(received.split(self._of_pack)) if self._rank in self._embeds else None

    def give_back(self, grad_VH: Tensor | None, *, like: Tensor) -> Tensor:
        """Bring all tokens' gradients to the ranks that made them; called by the whole replica.

        Args:
            grad_VH: [V, H], of all tokens of the step, on the first pipeline stage; elsewhere None.
            like: of their width, dtype and device.

        Returns:
            [V, H], the gradient of what this rank gave to `deliver`, summed over context-parallel
            ranks.
        """
        if self._num_ranks == 1:
            assert grad_VH is not None
            return grad_VH
        # Also a rank without tokens or gradients takes part: the exchange is a collective.
        answers = self._rank in self._answers
        sent = grad_VH if grad_VH is not None and answers else like.new_zeros(0, like.size(1))
        sends = self._of_rank if answers else [0] * self._num_ranks
        own = self._of_rank[self._rank]
        receives = [own if rank in self._answers else 0 for rank in range(self._num_ranks)]
        received = self._all_to_all(sent, sends, receives)
        return received.view(len(self._answers), own, like.size(1)).sum(0)

    def _all_to_all(self, sent: Tensor, sends: list[int], receives: list[int]) -> Tensor:
        received = sent.new_empty(sum(receives), sent.size(1))
        torch.distributed.all_to_all_single(
            received, sent.contiguous(), receives, sends, group=self._group
        )
        return received
