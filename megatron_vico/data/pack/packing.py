"""Which samples share a pack: a pure function of their lengths and tiles, in order.

Best-fit decreasing inside a window of the global order; packs that are not nearly full at the end
of a window are opened again and their samples go first in the next window (carry-over).
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_vico.errors import SampleError

FULL = 0.98
"""A pack this full (in tokens, tiles or samples) is not carried over; benchmarks/packing.py: packs
are 99.7 % full."""

MAX_CARRIES = 4
"""How often a sample may be carried over before its pack is emitted as it is, so that no sample
starves."""

LARGE = 1 / 8
"""Share of the capacity from which a sample is packed in order of length. Smaller ones are packed
in the global order: they fill the gaps just as well, and sorting them would put similar samples
into one pack."""


@dataclass(frozen=True, kw_only=True)
class PackLimits:
    """What one pack can hold."""

    capacity: int
    """Tokens, counted in the reference stream."""

    max_tiles: int
    max_samples: int | None = None
    """None: as many as fit."""


@dataclass(eq=False)
class _Bin:
    """A pack being filled."""

    number: int
    remaining: int
    remaining_tiles: int
    members: list[int] = field(default_factory=list)


def iter_packs(
    lengths: Sequence[int], *, tiles: Sequence[int], limits: PackLimits, window: int
) -> Iterator[tuple[int, ...]]:
    """Packs of samples, none lost, split or repeated; SampleError if one alone is more than a pack.

    `window` samples, whose lengths come in stream order, are packed together.

    Returns:
        Packs as ascending indices into `lengths`; within each window ordered by their first index.
    """
    num_samples = len(lengths)
    carries: dict[int, int] = {}  # how often each sample that waits was carried over
    for start in range(0, max(num_samples, 1), window):
        is_last = start + window >= num_samples
        # Those that waited go first: equal lengths keep this order, so they also leave first.
        candidates = [*carries, *range(start, min(start + window, num_samples))]
        emitted: list[_Bin] = []
        reopened: list[_Bin] = []
        for packed in _best_fit(candidates, lengths, tiles, limits):
            too_old = any(carries.get(i, 0) >= MAX_CARRIES for i in packed.members)
            (emitted if is_last or too_old or _is_full(packed, limits) else reopened).append(packed)
        # In stream order, not in that of the packs they lay in: what is packed next must not depend
        # on how this window happened to be divided.
        waiting = sorted(i for packed in reopened for i in packed.members)
        carries = {i: carries.get(i, 0) + 1 for i in waiting}
        yield from sorted(tuple(sorted(packed.members)) for packed in emitted)


def _best_fit(
    candidates: Sequence[int], lengths: Sequence[int], tiles: Sequence[int], limits: PackLimits
) -> list[_Bin]:
    """Each candidate goes into the fullest bin that still takes it, large ones first.

    A bin is opened only for a candidate that no other takes. So there are at most d + 1 times the
    fewest possible bins if d limits bind (Kou and Markowsky, 1977: "any fit"). If only tokens do:
    less than 8/7 of the fewest + 1 where a small candidate opens the last bin, since all others are
    then 7/8 full; otherwise best-fit decreasing of the large ones, at most 11/9 of the fewest + 4
    (Johnson et al., 1974).
    """
    bins: list[_Bin] = []
    open_bins: list[tuple[int, int]] = []  # (remaining tokens, number of the bin), ascending
    # Stable: equal lengths, and all small candidates, stay in stream order.
    threshold = limits.capacity * LARGE
    large_first = sorted(candidates, key=lambda i: -lengths[i] if lengths[i] >= threshold else 0)
    for i in large_first:
        length, num_tiles = int(lengths[i]), int(tiles[i])
        if length > limits.capacity or num_tiles > limits.max_tiles:
            raise SampleError(
                f"sample {i} of the stream: {length} tokens and {num_tiles} tiles, but a pack holds"
                f" {limits.capacity} tokens and {limits.max_tiles} tiles."
            )
        # The first open bin with room for the tokens is the fullest in tokens, and of equally full
        # ones the oldest (no bin has the number -1); from there on, the first with room for the
        # tiles too. Tiles are not part of the key: they bind rarely, tokens always.
        index = bisect.bisect_left(open_bins, (length, -1))
        while index < len(open_bins) and bins[open_bins[index][1]].remaining_tiles < num_tiles:
            index += 1
        if index < len(open_bins):
            chosen = bins[open_bins.pop(index)[1]]
        else:
            chosen = _Bin(
                number=len(bins), remaining=limits.capacity, remaining_tiles=limits.max_tiles
            )
            bins.append(chosen)
        chosen.members.append(i)
        chosen.remaining -= length
        chosen.remaining_tiles -= num_tiles
        # A bin that holds all the samples it may is never looked at again.
        if limits.max_samples is None or len(chosen.members) < limits.max_samples:
            bisect.insort(open_bins, (chosen.remaining, chosen.number))
    return bins


def _is_full(packed: _Bin, limits: PackLimits) -> bool:
    return (
        packed.remaining <= (1 - FULL) * limits.capacity
        or packed.remaining_tiles <= (1 - FULL) * limits.max_tiles
        or (limits.max_samples is not None and len(packed.members) >= FULL * limits.max_samples)
    )
