"""Which data-parallel rank gets which packs of a step: equal counts, and nearly equal costs.

Ranks wait for each other once a step, so the step takes as long as the rank with the most work.
Packs are equally full but not equally expensive: attention grows with the squares of the samples'
lengths, the vision tower with the tiles. Pure functions of the shards' index; every rank computes
the same assignment and talks to no other. Plain Python floats, since NumPy's sums round differently
on different processors.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


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

    def flops(self, lengths: Sequence[int], *, tiles: Sequence[int]) -> float:
        """The estimate for a pack from each sample's tokens, no tile compressed, and its tiles.

        The compressed stream is counted at its expected length: which tiles are compressed is drawn
        when the pack is made, and stratified draws stay near the mean. The language model head is
        left out (1 % at the real sizes): the index does not count response tokens.
        """
        shorter = [
            length - self.saved_per_tile * count
            for length, count in zip(lengths, tiles, strict=True)
        ]

        def one_pass(lens: Sequence[float]) -> float:
            squares = sum(length * length for length in lens)
            return self.per_token * sum(lens) + self.per_token_squared * squares

        language = self.full_passes * one_pass(lengths) + self.compressed_passes * one_pass(shorter)
        return language + self.per_tile * sum(tiles)


EQUAL_COST = PackCost(
    per_token=0.0,
    per_token_squared=0.0,
    per_tile=0.0,
    full_passes=0.0,
    compressed_passes=0.0,
    saved_per_tile=0.0,
)
"""Every pack counts the same; packs are then dealt one after the other."""

BALANCED = 1.005
"""Highest cost of a rank over the mean from which on swapping more packs is not worth the time."""

PARTNERS = 64
"""Ranks, those that have the least, with which swaps are tried."""

ROUNDING = 1e-9
"""A swap that gains less may gain nothing: sums of floats differ that much, and swapping would go
on for ever."""


def assign(costs: Sequence[float], *, num_ranks: int) -> tuple[tuple[int, ...], ...]:
    """As many packs for each rank, with the highest cost of a rank little above the mean.

    Longest processing time first: the most expensive pack goes to the rank with the least so far
    that may still take one. Equal counts are a constraint (pipeline schedules and collectives need
    the same number of microbatches everywhere), which leaves the ranks of the most expensive packs
    with too much; so packs are swapped while that helps: with 64 ranks of 4 packs the highest is
    1.005 of the mean instead of 1.027 (benchmarks/packing.py).

    Returns:
        For each rank its packs as ascending indices into `costs` (>= 0); r, r + num_ranks, ... for
        rank r if all are equal. The highest cost of a rank is never above what that order gives.

    Raises:
        ValueError: if the packs do not divide over the ranks.
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
