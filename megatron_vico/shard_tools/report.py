"""What a data set consists of, by its index alone: lengths, tiles, images, and how full its packs
are."""

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
MOST_PACKED = 1_000_000
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

    shuffle_shards: int = DataOptions().shuffle_shards
    """Shards whose samples are shuffled together."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackingFill:
    """The packs of an epoch, P of them."""

    limits: PackLimits

    tokens: IntArray
    """[P], uncompressed."""

    tiles: IntArray
    """[P]"""

    samples: IntArray
    """[P]"""

    num_too_large: int
    """Samples of the data set that no pack can hold; left out."""

    @property
    def token_fill(self) -> float:
        """Tokens over those that the packs could hold, in [0, 1]."""
        return float(self.tokens.mean() / self.limits.capacity) if len(self.tokens) else 0.0

    @property
    def tile_fill(self) -> float:
        """Tiles over those that the packs could hold, in [0, 1]."""
        return float(self.tiles.mean() / self.limits.max_tiles) if len(self.tiles) else 0.0

    @property
    def samples_per_pack(self) -> float:
        """Mean."""
        return float(self.samples.mean()) if len(self.samples) else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardStatistics:
    """The numbers of all D samples, each counted once, and the packs of an epoch."""

    num_tokens: IntArray
    """[D], with one token per tile."""

    num_responses: IntArray
    """[D], trained tokens."""

    num_tiles: IntArray
    """[D]"""

    num_images: IntArray
    """[D]"""

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
        """Count, and pack the first epoch.

        Args:
            folders: read as one data set.
            repeats: how often each of them comes in an epoch.
            packing: how to pack; None, not at all.

        Returns:
            The statistics.
        """
        tiles = np.concatenate([folder.num_tiles for folder in folders])
        tokens = np.concatenate([folder.num_tokens for folder in folders])
        lengths = None if packing is None else tokens + (packing.tokens_kept - 1) * tiles
        fill = None
        if packing is not None and lengths is not None:
            order = EpochOrder(
                [folder.samples_per_shard for folder in folders],
                repeats=repeats,
                seed=packing.seed,
                epoch=0,
                block_shards=packing.shuffle_shards,
            )
            ids, _ = order.slice(0, MOST_PACKED)
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

    @cached_property
    def kinds(self) -> IntArray:
        """[D], index into KINDS."""
        return np.minimum(self.num_images, 2)

    def as_json(self) -> dict[str, Any]:
        """Plain numbers, shares in [0, 1]."""
        counts = np.bincount(self.kinds, minlength=len(KINDS)).tolist()
        content: dict[str, Any] = {
            "num_samples": len(self.num_tokens),
            "kinds": dict(zip(KINDS, counts, strict=True)),
            "columns": {name: spread(values) for name, values in self.columns.items()},
        }
        if self.packing is not None:
            fill = self.packing
            content["packing"] = {
                "seq_length": fill.limits.capacity,
                "max_tiles_per_pack": fill.limits.max_tiles,
                "num_packs": len(fill.tokens),
                "num_samples": int(fill.samples.sum()),
                "samples_per_pack": fill.samples_per_pack,
                "token_fill": fill.token_fill,
                "tile_fill": fill.tile_fill,
                "num_too_large": fill.num_too_large,
            }
        return content

    def as_text(self) -> str:
        """Tables for a terminal."""
        rows = [["", "total", "mean", "min", *(f"{p} %" for p in PERCENTILES), "max"]]
        for name, values in self.columns.items():
            numbers = spread(values)
            mean = f"{numbers.pop('mean'):,.1f}"
            total, *rest = (f"{number:,}" for number in numbers.values())
            rows.append([name, total, mean, *rest])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            row[0].ljust(widths[0])
            + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
            for row in rows
        ]
        counts = np.bincount(self.kinds, minlength=len(KINDS))
        shares = zip(KINDS, counts.tolist(), (counts / len(self.kinds)).tolist(), strict=True)
        lines += ["", ", ".join(f"{name} {count:,} ({share:.1%})" for name, count, share in shares)]
        if self.packing is not None:
            lines += ["", _packing_line(self.packing)]
        for name in (
            "tokens, one per tile" if self.lengths is None else "tokens, uncompressed",
            "tiles",
        ):
            lines += ["", f"{name}, a sample:", *histogram_lines(self.columns[name])]
        return "\n".join(lines)


def spread(values: IntArray) -> dict[str, float]:
    """Total, mean, min, percentiles (values that occur, not between two) and max of [D] numbers;
    zeros if D is 0."""
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
    """(lowest, highest, count) of ranges that end at powers of two: 0, 1, 2, 3 to 4, 5 to 8, ...;
    none outside them.

    Args:
        values: [D], 0 or more.
    """
    if not len(values):
        return []
    ends = [0, *(1 << power for power in range(int(values.max()).bit_length() + 1))]
    counts = np.bincount(np.searchsorted(ends, values), minlength=len(ends)).tolist()
    rows = list(zip([0, *(end + 1 for end in ends[:-1])], ends, counts, strict=True))
    filled = [number for number, row in enumerate(rows) if row[2]]
    return rows[filled[0] : filled[-1] + 1]


def histogram_lines(values: IntArray) -> list[str]:
    """The histogram as bars of characters."""
    rows = histogram(values)
    most = max((count for *_, count in rows), default=1)
    names = [str(low) if low == high else f"{low} to {high}" for low, high, _ in rows]
    width, count_width = max(map(len, names), default=0), len(f"{most:,}")
    return [
        f"  {name:>{width}}  {count:>{count_width},}  {count / len(values):6.1%}  "
        f"{'#' * -(-_BAR_WIDTH * count // most)}".rstrip()
        for name, (*_, count) in zip(names, rows, strict=True)
    ]


def _packing_line(fill: PackingFill) -> str:
    limits = f"{fill.limits.capacity:,} tokens and {fill.limits.max_tiles:,} tiles"
    too_large = (
        f"; {fill.num_too_large:,} samples are too large and left out" if fill.num_too_large else ""
    )
    return (
        f"packs of at most {limits}: {len(fill.tokens):,} packs of {fill.samples.sum():,} samples, "
        f"{fill.samples_per_pack:.1f} a pack, {fill.token_fill:.1%} full in tokens, "
        f"{fill.tile_fill:.1%} in tiles{too_large}"
    )


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
