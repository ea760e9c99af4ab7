"""Tiles of a step spread evenly over a replica's ranks; visual tokens go to the embedding.

Every tile is the same amount of work for the vision encoder, so equal counts are equal loads,
whatever the layout of the language model. Rank r of a replica encodes an unbroken run of the step's
tiles; each rank of the first pipeline stage receives the visual tokens of its part of the sequence,
in order, and the gradients travel the same way back. That goes in turns, a chunk of each rank's
tiles at a time: nobody holds all that it made beside all that it received. Who sends how much
follows from plans and streams, which every rank of the replica has.

Shapes: N tiles, V visual tokens, H channels of the language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, batched, pairwise

import torch
from torch import Tensor

from megatron_vico.models.language_model import LanguageInputs
from megatron_vico.models.to_device import to_device
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

    def num_turns(self, chunk_tiles: int) -> int:
        """Turns until the rank with most tiles is through; at least 1."""
        most = max(stop - start for start, stop in pairwise(self.starts))
        return max(1, -(-most // chunk_tiles))

    def turn(self, rank: int, turn: int, chunk_tiles: int) -> slice:
        """A rank's tiles in one turn; none where it has fewer than others."""
        run = self.of(rank)
        start = min(run.start + turn * chunk_tiles, run.stop)
        return slice(start, min(start + chunk_tiles, run.stop))


def split_tiles(units: Sequence[int], *, num_ranks: int, rank: int) -> TileSplit:
    """Cut a step's tiles into runs of equal length, as near as the units allow.

    Args:
        units: tiles of each thing that must stay on one rank, in order: 1 for each tile, or the
            tiles of each image where the router looks at whole images.

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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Turn:
    """What one rank sends and receives of a chunk of each rank's tiles."""

    num_tokens: int
    """Of this rank's chunk."""

    sent: tuple[Tensor, ...]
    """[V] int64 for each rank that embeds: which tokens of this rank's chunk it gets."""

    places: list[range]
    """Of each rank: where what it sends belongs among all that this rank embeds."""


class TokenExchange:
    """Carries a pass's visual tokens to the first pipeline stage, and their gradients back."""

    def __init__(
        self,
        tokens_per_pack: Sequence[Tensor],
        inputs: Sequence[LanguageInputs],
        split: TileSplit,
        groups: Groups,
        *,
        chunk_tiles: int,
    ) -> None:
        """Work out who sends what.

        Args:
            tokens_per_pack: [N] int64 a pack, on the CPU: visual tokens of each of its tiles.
            inputs: of the packs whose tokens they are; they say which rank embeds which token.
            chunk_tiles: tiles of each rank that go in one turn.
        """
        self._group, self._num_ranks = groups.replica, len(split.starts) - 1
        tensor_size, context_size = groups.language.tp.size(), groups.language.cp.size()
        sequence_size = sum(inputs[0].document_lens) // inputs[0].shard_len // context_size
        embeds = range(tensor_size * context_size)  # ranks of the replica that embed tokens
        # Without sequence parallelism all tensor-parallel ranks embed, and have gradients of, the
        # same tokens.
        self._answers = embeds if sequence_size > 1 else embeds[::tensor_size]
        """Those whose gradients go back; one for each token."""
        self._rank = split.rank

        def embedded_by(rank: int, shard_V: Tensor) -> Tensor:
            context, tensor = divmod(rank, tensor_size)
            return shard_V == context * sequence_size + (tensor if sequence_size > 1 else 0)

        shard_V = torch.cat([each.visual_shard_V for each in inputs])
        ends = [0, *torch.cat([*tokens_per_pack, shard_V[:0]]).cumsum(0).tolist()]
        assert len(shard_V) == ends[-1], "as many visual tokens in the streams as of the tiles"
        self.of_pack: list[int] | None = None
        """Tokens of each pack that this rank embeds; None beyond the first pipeline stage."""
        rows = torch.zeros(ends[-1] + 1, dtype=torch.int64)  # of them, before each token of a step
        if split.rank in embeds:
            torch.cumsum(embedded_by(split.rank, shard_V), 0, out=rows[1:])
            self.of_pack = [
                int(embedded_by(split.rank, each.visual_shard_V).sum()) for each in inputs
            ]

        def tokens(rank: int, turn: int) -> slice:
            tiles = split.turn(rank, turn, chunk_tiles)
            return slice(ends[tiles.start], ends[tiles.stop])

        turns = range(split.num_turns(chunk_tiles))
        chunks = [shard_V[tokens(split.rank, turn)] for turn in turns]
        sent = [embedded_by(rank, chunk_V).nonzero() for chunk_V in chunks for rank in embeds]
        # All at once: a copy to the device that waits for the chunk before it would hold up the
        # next one.
        on_device = to_device(torch.cat(sent).squeeze(1), groups.device)
        indices = batched(on_device.split([len(each) for each in sent]), len(embeds))
        come = ([tokens(rank, turn) for rank in range(self._num_ranks)] for turn in turns)
        self._turns = [
            _Turn(
                num_tokens=len(chunk_V),
                sent=index,
                places=[range(int(rows[each.start]), int(rows[each.stop])) for each in ranks],
            )
            for chunk_V, index, ranks in zip(chunks, indices, come, strict=True)
        ]

    def deliver(self, turn: int, tokens_VH: Tensor, received_VH: Tensor | None) -> None:
        """Bring visual tokens to the ranks that embed them; called by the whole replica.

        Args:
            turn: each is taken once, in order.
            tokens_VH: [V, H], of this rank's tiles in this turn, without a graph.
            received_VH: [V, H] on the first pipeline stage, what this rank embeds of all packs, one
                after the other (`of_pack`): what comes is written into it. Elsewhere None.
        """
        sent, places = self._turns[turn].sent, self._turns[turn].places
        sends = [len(each) for each in sent] + [0] * (self._num_ranks - len(sent))
        chosen = tokens_VH.index_select(0, torch.cat(sent))
        came = self._all_to_all(chosen, sends, [len(each) for each in places])
        if received_VH is not None:
            for place, part in zip(places, came.split([len(each) for each in places]), strict=True):
                received_VH[place.start : place.stop] = part

    def give_back(self, turn: int, grad_VH: Tensor | None, *, like: Tensor) -> Tensor:
        """Bring the gradients to the ranks that made the tokens; called by the whole replica.

        `grad_VH` is that of what was received, None where nothing is; `like`, [0, H], has their
        dtype and device. Returns [V, H], the gradient of what this rank gave to `deliver` then.
        """
        sent, places = self._turns[turn].sent, self._turns[turn].places
        # Also a rank without tokens or gradients takes part: the exchange is a collective.
        parts, sends = [like], [0] * self._num_ranks
        if grad_VH is not None and self._rank in self._answers:
            parts = [grad_VH[place.start : place.stop] for place in places]
            sends = [len(each) for each in parts]
        index = [sent[rank] for rank in self._answers]
        receives = [0] * self._num_ranks
        for rank, each in zip(self._answers, index, strict=True):
            receives[rank] = len(each)
        came = self._all_to_all(torch.cat(parts), sends, receives)
        grad = like.new_empty(self._turns[turn].num_tokens, like.size(1))
        return grad.index_copy_(0, torch.cat(index), came)

    def _all_to_all(self, sent: Tensor, sends: list[int], receives: list[int]) -> Tensor:
        if self._num_ranks == 1:
            return sent
        received = sent.new_empty(sum(receives), sent.size(1))
        torch.distributed.all_to_all_single(received, sent, receives, sends, group=self._group)
        return received
