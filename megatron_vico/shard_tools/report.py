"""What a data set consists of, by its index alone: lengths, tiles, images, and its packs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from megatron_vico.config.schema import DataOptions
from megatron_vico.data.pack.order import EpochOrder
from megatron_vico.data.pack.packing import PackLimits, iter_packs
from megatron_vico.data.samples import IntArray
from megatron_vico.data.shards.reader import ShardFolder

PERCENTILES = (5, 25, 50, 75, 95, 99)
KINDS = ("text only", "one image", "several images")
MAX_PACKED = 1_000_000
"""Samples that are packed, the first of the global order: a second of work, and the fill is known
to 0.01 %."""

_BAR_WIDTH = 40


@dataclass(frozen=True, kw_only=True)
class PackingOptions:
    """How a run packs."""

    limits: PackLimits
    window: int
    """Samples of the global order that are packed together."""

    tokens_kept: int
    """Visual tokens of a tile that is not compressed."""

    seed: int = 1234
    """Of the order."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackingFill:
    """The packs of an epoch, P of them."""

    limits: PackLimits

    tokens: IntArray
    """[P], uncompressed."""

    tiles: IntArray
    samples: IntArray
    num_too_large: int
    """Samples of the data set that no pack can hold; left out."""

    @property
    def token_fill(self) -> float:
        """Tokens over those that the packs could hold, in [0, 1]."""
        return _mean(self.tokens) / self.limits.capacity

    @property
    def tile_fill(self) -> float:
        """Tiles over those that the packs could hold, in [0, 1]."""
        return _mean(self.tiles) / self.limits.max_tiles

    @property
    def samples_per_pack(self) -> float:
        """Mean."""
        return _mean(self.samples)

    def as_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "seq_length": self.limits.capacity,
            "max_tiles_per_pack": self.limits.max_tiles,
            "num_packs": len(self.tokens),
            "num_samples": int(self.samples.sum()),
            "samples_per_pack": self.samples_per_pack,
            "token_fill": self.token_fill,
            "tile_fill": self.tile_fill,
            "num_too_large": self.num_too_large,
        }

    def as_text(self) -> str:
        """One line."""
        limits = f"{self.limits.capacity:,} tokens and {self.limits.max_tiles:,} tiles"
        line = (
            f"packs of at most {limits}: {len(self.tokens):,} packs of {self.samples.sum():,}"
            f" samples, {self.samples_per_pack:.1f} a pack, {self.token_fill:.1%} full in tokens,"
            f" {self.tile_fill:.1%} in tiles"
        )
        if self.num_too_large:
            line += f"; {self.num_too_large:,} samples are too large and left out"
        return line


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardStatistics:
    """The numbers of all D samples, each counted once, and the packs of an epoch."""

    num_tokens: IntArray
    """[D], with one token per tile."""

    num_responses: IntArray
    """[D], trained tokens."""

    num_tiles: IntArray
    num_images: IntArray
    lengths: IntArray | None = None
    """[D], tokens with every tile uncompressed; None where the tokens of a tile are not known."""

    packing: PackingFill | None = None

    @classmethod
    def of(
        cls,
        folders: Sequence[ShardFolder],
        *,
        repeats: Sequence[float],
        packing: PackingOptions | None = None,
    ) -> "ShardStatistics":
        """Count folders as one data set; pack its first epoch, each as often as `repeats` says."""
        tiles = np.concatenate([folder.num_tiles for folder in folders])
        tokens = np.concatenate([folder.num_tokens for folder in folders])
        lengths = fill = None
        if packing is not None:
            lengths = tokens + (packing.tokens_kept - 1) * tiles
            order = EpochOrder(
                [folder.samples_per_shard for folder in folders],
                repeats=repeats,
                seed=packing.seed,
                epoch=0,
                block_shards=DataOptions().shuffle_shards,
            )
            ids, _ = order.slice(0, MAX_PACKED)
            fill = _pack(lengths, tiles, ids=ids, options=packing)
        return cls(
            num_tokens=tokens,
            num_responses=np.concatenate([folder.num_responses for folder in folders]),
            num_tiles=tiles,
            num_images=np.concatenate([folder.num_images for folder in folders]),
            lengths=lengths,
            packing=fill,
        )

    @cached_property
    def columns(self) -> dict[str, IntArray]:
        """What is counted -> [D]."""
        counted = {
            "tokens, one per tile": self.num_tokens,
            "tokens, uncompressed": self.lengths,
            "trained tokens": self.num_responses,
            "tiles": self.num_tiles,
            "images": self.num_images,
        }
        return {name: values for name, values in counted.items() if values is not None}

    @property
    def length_column(self) -> str:
        """The column of lengths as they are trained, as far as they are known."""
        return "tokens, one per tile" if self.lengths is None else "tokens, uncompressed"

    @cached_property
    def kinds(self) -> IntArray:
        """[D], index into KINDS."""
        return np.minimum(self.num_images, 2)

    @cached_property
    def num_of_kind(self) -> dict[str, int]:
        """Samples of each of KINDS."""
        counts = np.bincount(self.kinds, minlength=len(KINDS)).tolist()
        return dict(zip(KINDS, counts, strict=True))

    def as_json(self) -> dict[str, Any]:
        """Plain numbers, shares in [0, 1]."""
        content = {
            "num_samples": len(self.num_tokens),
            "kinds": self.num_of_kind,
            "columns": {name: spread(values) for name, values in self.columns.items()},
        }
        return content if self.packing is None else {**content, "packing": self.packing.as_json()}

    def as_text(self) -> str:
        """Tables for a terminal."""
        rows = [["", "total", "mean", "min", *(f"{p} %" for p in PERCENTILES), "max"]]
        for name, values in self.columns.items():
            numbers = spread(values)
            mean = f"{numbers.pop('mean'):,.1f}"
            total, *rest = (f"{number:,}" for number in numbers.values())
            rows.append([name, total, mean, *rest])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for name, *cells in rows:
            padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *padded]))
        shares = [
            f"{kind} {count:,} ({count / len(self.kinds):.1%})"
            for kind, count in self.num_of_kind.items()
        ]
        lines += ["", ", ".join(shares)]
        if self.packing is not None:
            lines += ["", self.packing.as_text()]
        for name in (self.length_column, "tiles"):
            lines += ["", f"{name}, a sample:", *histogram_lines(self.columns[name])]
        return "\n".join(lines)


def spread(values: IntArray) -> dict[str, float]:
    """Total, mean, min, percentiles and max of [D] numbers; zeros if D is 0.

    Percentiles are values that occur, not between two.
    """
    present = values if len(values) else np.zeros(1, np.int64)
    percentiles = np.percentile(present, PERCENTILES, method="inverted_cdf").tolist()
    return {
        "total": int(values.sum()),
        "mean": float(present.mean()),
        "min": int(present.min()),
        **{f"p{p}": int(value) for p, value in zip(PERCENTILES, percentiles, strict=True)},
        "max": int(present.max()),
    }


def histogram(values: IntArray) -> list[tuple[int, int, int]]:
    """(lowest, highest, count) of the ranges 0, 1, 2, 3 to 4, 5 to 8, ... that hold [D] values."""
    if not len(values):
        return []
    ends = [0, *(1 << power for power in range(int(values.max()).bit_length() + 1))]
    counts = np.bincount(np.searchsorted(ends, values), minlength=len(ends)).tolist()
    rows = list(zip([0, *(end + 1 for end in ends[:-1])], ends, counts, strict=True))
    filled = np.flatnonzero(counts)
    return rows[filled[0] : filled[-1] + 1]


def histogram_lines(values: IntArray) -> list[str]:
    """The histogram as bars of characters."""
    rows = histogram(values)
    longest = max((count for *_, count in rows), default=1)
    names = [str(low) if low == high else f"{low} to {high}" for low, high, _ in rows]
    width, count_width = max(map(len, names), default=0), len(f"{longest:,}")
    return [
        f"  {name:>{width}}  {count:>{count_width},}  {count / len(values):6.1%}  "
        f"{'#' * -(-_BAR_WIDTH * count // longest)}".rstrip()
        for name, (*_, count) in zip(names, rows, strict=True)
    ]


def _mean(values: IntArray) -> float:
    return float(values.mean()) if len(values) else 0.0


def _pack(
    lengths: IntArray, tiles: IntArray, *, ids: IntArray, options: PackingOptions
) -> PackingFill:
    limits = options.limits
    too_large = (lengths > limits.capacity) | (tiles > limits.max_tiles)
    kept = ids[~too_large[ids]]
    lengths_of, tiles_of = lengths[kept].tolist(), tiles[kept].tolist()
    packs = iter_packs(lengths_of, tiles=tiles_of, limits=limits, window=options.window)
    sums = [
        (sum(lengths_of[i] for i in pack), sum(tiles_of[i] for i in pack), len(pack))
        for pack in packs
    ]
    table = np.array(sums, dtype=np.int64).reshape(-1, 3)
    return PackingFill(
        limits=limits,
        tokens=table[:, 0],
        tiles=table[:, 1],
        samples=table[:, 2],
        num_too_large=int(too_large.sum()),
    )
