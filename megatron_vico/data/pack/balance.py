"""Which data-parallel rank gets which packs of a step, so that costs are nearly equal.

Ranks wait for each other once a step, so the step takes as long as the rank with the most work.
Packs are equally full but not equally expensive: attention grows with the squares of the samples'
lengths, the vision tower with the tiles. Where ranks may make unequal numbers of passes, a pack is
cut between two samples if that evens them out; what is drawn for a pack is drawn before, for all of
it, so that neither plans nor losses depend on the cut. Pure functions of the shards' index; every
rank computes the same assignment and talks to no other. Plain Python floats, since NumPy's sums
round differently on different processors.
"""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, batched
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PackCost:
    """Estimated FLOPs of one pack in one step, by model and stage (training/flops.py).

    A pass is the forward FLOPs of the language model: a trained model has three, its backward pass
    counting two.
    """

    per_token: float
    """FLOPs a token costs in the linear layers of one pass."""

    per_token_squared: float
    """FLOPs that one pass spends on attention, divided by the sum of the squares of the samples'
    lengths."""

    per_tile: float
    """FLOPs that all passes of the vision tower spend on one tile."""

    full_passes: float
    """Passes over the uncompressed stream."""

    compressed_passes: float
    """Passes over the compressed stream."""

    saved_per_tile: float
    """Tokens by which the compressed stream is expected to be shorter, per tile."""

    def flops(self, length: int, *, tiles: int) -> float:
        """The estimate for one sample, from its tokens with no tile compressed, and its tiles.

        A pack costs what its samples do. The compressed stream is counted at its expected length:
        which tiles are compressed is drawn when the pack is made, and stratified draws stay near
        the mean. The language model head is left out (1 % at the real sizes): the index does not
        count response tokens.
        """

        def one_pass(tokens: float) -> float:
            return self.per_token * tokens + self.per_token_squared * tokens * tokens

        shorter = length - self.saved_per_tile * tiles
        language = self.full_passes * one_pass(length) + self.compressed_passes * one_pass(shorter)
        return language + self.per_tile * tiles


EQUAL_COST = PackCost(
    per_token=0.0,
    per_token_squared=0.0,
    per_tile=0.0,
    full_passes=0.0,
    compressed_passes=0.0,
    saved_per_tile=0.0,
)
"""Every pack counts the same; packs are then dealt one after the other."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Samples `first` to `stop` of a pack, one microbatch of one rank; nearly always all of it."""

    pack: int
    """Index in the step."""

    first: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How ranks must work together, by the layout (`config/layout.py`)."""

    in_step: int = 1
    """Neighbouring ranks that wait for each other in every microbatch: those that share experts."""

    counts: Literal["equal", "any"] = "any"
    """Whether all ranks must have the same number of microbatches, whole packs then."""


BALANCED = 1.005
"""Highest cost of a rank over the mean from which on swapping more packs is not worth the time."""

CUT = 1.02
"""Highest cost of a rank over the mean from which on packs are cut: each cut is one more
microbatch."""

PARTNERS = 64
"""Ranks, those that have the least, with which swaps are tried."""

ROUNDING = 1e-9
"""A swap that gains less may gain nothing: sums of floats differ that much, and swapping would go
on for ever."""


def share(
    costs: Sequence[Sequence[float]], *, num_ranks: int, sharing: Sharing
) -> tuple[tuple[Part, ...], ...]:
    """What each rank works on, in running order, from the cost of each pack's samples.

    Returns:
        For each rank its microbatches, one or more. Ranks that wait for each other in every
        microbatch have packs of like cost at the same place in their lists, as many each.

    Raises:
        ValueError: if the packs do not divide over the ranks.
    """
    of_packs, size = [sum(each) for each in costs], sharing.in_step
    if num_ranks % size:
        raise ValueError(f"{num_ranks} ranks are no whole number of groups of {size}")
    rows: Sequence[tuple[int, ...]] = [(i,) for i in range(len(costs))]
    if size > 1:
        rows = list(batched(sorted(range(len(costs)), key=lambda i: -of_packs[i]), size))
    of_groups = assign([of_packs[row[0]] for row in rows], num_ranks=num_ranks // size)
    groups = [
        [tuple(Part(pack=i, first=0, stop=len(costs[i])) for i in rows[row]) for row in of_group]
        for of_group in of_groups
    ]
    if sharing.counts == "any":
        _cut(groups, costs)
    return tuple(tuple(row[place] for row in group) for group in groups for place in range(size))


def assign(costs: Sequence[float], *, num_ranks: int) -> tuple[tuple[int, ...], ...]:
    """As many packs for each rank, with the highest cost of a rank little above the mean.

    Longest processing time first: the most expensive pack goes to the rank with the least so far
    that may still take one. Equal counts leave the ranks of the most expensive packs with too
    much; so packs are swapped while that helps: with 64 ranks of 4 packs the highest is 1.005 of
    the mean instead of 1.027 (benchmarks/packing.py).

    Returns:
        For each rank its packs as ascending indices into `costs` (>= 0); r, r + num_ranks, ... for
        rank r if all are equal. The highest cost of a rank is never above what that order gives.
    """
    if len(costs) % num_ranks:
        raise ValueError(
            f"{len(costs)} packs do not divide over {num_ranks} ranks; choose a multiple"
        )
    per_rank = len(costs) // num_ranks
    members: list[list[int]] = [[] for _ in range(num_ranks)]
    not_full = [(0.0, rank) for rank in range(num_ranks)]  # a heap of (cost so far, rank)
    # The sort is stable: packs of equal cost stay in order.
    for pack in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = heapq.heappop(not_full)
        members[rank].append(pack)
        if len(members[rank]) < per_rank:
            heapq.heappush(not_full, (load + costs[pack], rank))
    _swap(members, costs)
    greedy = tuple(tuple(sorted(each)) for each in members)
    dealt = tuple(tuple(range(rank, len(costs), num_ranks)) for rank in range(num_ranks))
    return min(
        dealt,
        greedy,
        key=lambda assignment: max(sum(costs[i] for i in each) for each in assignment),
    )


def _swap(members: list[list[int]], costs: Sequence[float]) -> None:
    """Swap a pack of the busiest rank for a cheaper one, while that lowers the pair's maximum.

    `members`, the packs of each rank, is changed in place.
    """
    loads = [sum(costs[i] for i in each) for each in members]
    while (highest := max(loads)) > BALANCED * sum(costs) / len(members):
        a = loads.index(highest)
        swaps = [
            (max(highest - costs[i] + costs[j], load + costs[i] - costs[j]), b, x, y)
            for load, b in heapq.nsmallest(PARTNERS, zip(loads, range(len(loads)), strict=True))
            for x, i in enumerate(members[a])
            for y, j in enumerate(members[b])
        ]
        lowest, b, x, y = min(swaps)
        if lowest >= highest * (1 - ROUNDING):
            return
        members[a][x], members[b][y] = members[b][y], members[a][x]
        for rank in (a, b):
            loads[rank] = sum(costs[i] for i in members[rank])


Row = tuple[Part, ...]
"""What the ranks of a group, which wait for each other, work on at the same time: parts of like
cost, since it takes as long as the most expensive."""


def _cut(groups: list[list[Row]], costs: Sequence[Sequence[float]]) -> None:
    """Move the last samples of a row from the busiest group to the idlest, while that helps.

    Where samples are long, whole packs cannot be balanced: a pack of one text of 32,768 tokens
    costs twice as much as one of short samples, and every other pack costs at least 0.9 of the
    mean, so that of 4 packs a rank one too many or too few is always left (benchmarks/packing.py).
    `groups`, the rows of each, is changed in place.
    """
    loads = [sum(_row_cost(row, costs) for row in group) for group in groups]
    mean = sum(loads) / len(loads)
    while (highest := max(loads)) > CUT * mean:
        a, b = loads.index(highest), loads.index(min(loads))
        wanted = min(highest - mean, CUT * mean - loads[b])
        found = []
        for place, row in enumerate(groups[a]):
            whole = _row_cost(row, costs)
            for head, tail in _cuts(row, costs):
                left, moved = highest - whole + _row_cost(head, costs), _row_cost(tail, costs)
                if max(left, loads[b] + moved) < highest * (1 - ROUNDING):
                    found.append((abs(moved - wanted), place, left, moved, head, tail))
        if not found:
            return
        _, place, loads[a], moved, groups[a][place], tail = min(found, key=lambda each: each[:4])
        groups[b].append(tail)
        loads[b] += moved


def _cuts(row: Row, costs: Sequence[Sequence[float]]) -> Iterator[tuple[Row, Row]]:
    """Rows in two: wherever the first part can be cut, and the others where as much moves."""
    tails = [  # of each part: what moves if it is cut before a sample, and that sample
        list(
            zip(accumulate(costs[part.pack][part.stop - 1 : part.first : -1]), places, strict=True)
        )
        for part in row
        for places in [range(part.stop - 1, part.first, -1)]
    ]
    if not all(tails):  # a part of one sample
        return
    for wanted, _ in tails[0]:
        firsts = [min(each, key=lambda tail: abs(tail[0] - wanted))[1] for each in tails]
        pairs = list(zip(row, firsts, strict=True))
        yield (
            tuple(replace(part, stop=first) for part, first in pairs),
            tuple(replace(part, first=first) for part, first in pairs),
        )


def _row_cost(row: Row, costs: Sequence[Sequence[float]]) -> float:
    return max(sum(costs[part.pack][part.first : part.stop]) for part in row)
