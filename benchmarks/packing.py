#!/usr/bin/env python3
"""How full packs are, how fast they are made, how evenly they load the ranks; by one core.

    python benchmarks/packing.py --json runs/packing.json

The mixture: text only 25 %, one image of 1 to 13 tiles 60 %, several images or a video of 4 to 40
tiles 15 %; texts are of lognormal length (at most 8,192 tokens), 3,200 tokens in the mean; packs of
32,768 tokens and 112 tiles. Costs are those of a consistency step of the 8B, 4 packs a rank.
Shorter texts show where the limit on tiles binds: above 87.5 % visual tokens, packs
cannot be full of tokens. Longer ones show where whole packs cannot be balanced: some rank has the
most expensive pack and at least the cheapest others (floor), unless packs are cut. Speed is by CPU
time, order and packing together. The last two lines hold the result against the project's goals.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_vico.config.registry import get_model_config
from megatron_vico.config.schema import DataOptions, StageOptions
from megatron_vico.data.encode.sample_encoder import EncodingSettings
from megatron_vico.data.pack.balance import Sharing, assign, share
from megatron_vico.data.pack.plan import PackPlan
from megatron_vico.data.shards.index import FolderIndex, ShardFiles, ShardIndex
from megatron_vico.data.shards.reader import ShardFolder
from megatron_vico.training.flops import pack_cost

TOKENS_PER_TILE = 256
SAMPLES_PER_SHARD = 1000
PACKS_PER_RANK = 4
IN_STEP = 4
"""Ranks that share experts, in the last columns: the layout of the 241B's recipe."""
FILL_GOAL, BALANCE_GOAL = 0.97, 1.03
"""Least fill at 80 % visual tokens; highest cost of a rank over the mean, 64 ranks, long texts."""
KINDS = ((0.25, 0, 0, 2095), (0.6, 1, 13, 950), (0.15, 4, 40, 1680))
"""Share, fewest and most tiles, and mean text tokens of each kind of sample."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One row of the first table."""

    window: int
    visual: float
    """Share of visual tokens in all."""
    fill: float
    """Of the tokens that the packs could hold."""
    tile_fill: float
    """Of the tiles that they could hold."""
    possible: float
    """Fill of tokens that no packing exceeds."""
    packs_per_s: float
    tokens_per_s: float


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Highest cost of a rank over the mean: the mean over steps."""

    longest_text: int
    dp_size: int
    dealt: float
    """Packs in their order."""
    whole: float
    """Whole packs by cost, as many a rank: what the interleaved schedule can have."""
    floor: float
    """The most expensive pack with the cheapest others."""
    cut: float
    """By cost, packs cut where that helps."""
    worst: float
    """The same in the worst step."""
    microbatches: float
    """Microbatches for each pack, then."""
    loose: float
    """Whole packs where IN_STEP ranks wait for each other in every microbatch."""
    in_step: float
    """The same with packs of like cost at the same time, cut where that helps."""


def mixture_folder(
    num_samples: int, *, text: float = 1.0, longest: int = 8192, seed: int = 0
) -> ShardFolder:
    """An index of the mixture, texts `text` times as long, at most `longest` tokens."""
    random = np.random.default_rng(seed)
    kind = random.choice(len(KINDS), size=num_samples, p=[share for share, *_ in KINDS])
    fewest, most, mean = (np.array([each[i] for each in KINDS])[kind] for i in (1, 2, 3))
    tiles = random.integers(fewest, most + 1)
    lengths = text * mean * np.exp(random.normal(0.0, 1.0, num_samples) - 0.5)
    texts = np.minimum(lengths, longest).astype(np.int64)
    texts = np.clip(texts, 16, DataOptions().seq_length - TOKENS_PER_TILE * tiles)
    shards = [
        ShardIndex(
            keys=np.zeros(len(part), dtype=np.bytes_),
            member_starts=np.arange(0, 2 * len(part) + 1, 2),
            members=np.zeros((2 * len(part), 2), dtype=np.int64),
            num_tokens=texts[part] + tiles[part],
            num_responses=texts[part] // 2,
            tiles_per_image=tiles[part],
        )
        for part in np.split(
            np.arange(num_samples), range(SAMPLES_PER_SHARD, num_samples, SAMPLES_PER_SHARD)
        )
    ]
    files = [
        ShardFiles(
            name="all.tar",
            num_bytes=0,
            sha256="0" * 64,
            num_samples=len(each),
            index_sha256="0" * 64,
        )
        for each in shards
    ]
    settings = EncodingSettings(image_size=448, max_dynamic_patch=12, use_thumbnail=True)
    index = FolderIndex(tokenizer="", settings=settings, shards=tuple(files))
    return ShardFolder(Path(), index, shards)


def plan_of(
    folder: ShardFolder, *, window: int = DataOptions().packing_window, packs: int = 1
) -> PackPlan:
    """Packs of the folder, `packs` a step, at the cost of the 8B."""
    return PackPlan(
        [folder],
        options=DataOptions(packing_window=window),
        tokens_kept=TOKENS_PER_TILE,
        seed=0,
        global_batch_size=packs,
        cost=pack_cost(get_model_config("internvl3_5-8b"), StageOptions(stage="consistency")),
    )


def measure_packing(folder: ShardFolder, *, window: int = DataOptions().packing_window) -> Packed:
    """Pack one epoch."""
    plan = plan_of(folder, window=window)
    start = time.process_time()
    packs = sum(1 for _ in plan.epoch(0))
    elapsed_s = time.process_time() - start
    tokens, tiles = int(plan.lengths.sum()), int(plan.num_tiles.sum())
    fewest = max(tokens / plan.limits.capacity, tiles / plan.limits.max_tiles)
    return Packed(
        window=window,
        visual=TOKENS_PER_TILE * tiles / tokens,
        fill=tokens / (packs * plan.limits.capacity),
        tile_fill=tiles / (packs * plan.limits.max_tiles),
        possible=tokens / (fewest * plan.limits.capacity),
        packs_per_s=packs / elapsed_s,
        tokens_per_s=tokens / elapsed_s,
    )


def measure_balance(*, num_samples: int, longest: int, dp_size: int, num_steps: int) -> Balance:
    """Ranks that get packs one after the other, and by cost."""
    num_packs = dp_size * PACKS_PER_RANK
    plan = plan_of(mixture_folder(num_samples, longest=longest), packs=num_packs)
    steps = []
    for step in itertools.islice(plan.steps(), num_steps):
        of_packs = [sum(each) for each in step.costs]
        costs, mean = sorted(of_packs), sum(of_packs) / dp_size
        in_order = [range(rank, num_packs, dp_size) for rank in range(dp_size)]
        whole = assign(of_packs, num_ranks=dp_size)
        alone, waiting = (
            [
                [sum(step.costs[part.pack][part.first : part.stop]) for part in of_rank]
                for of_rank in share(step.costs, num_ranks=dp_size, sharing=sharing)
            ]
            for sharing in (Sharing(), Sharing(in_step=IN_STEP))
        )
        steps.append(
            (
                imbalance(of_packs, in_order),
                imbalance(of_packs, whole),
                max(1.0, (costs[-1] + sum(costs[: PACKS_PER_RANK - 1])) / mean),
                max(map(sum, alone)) / mean,
                sum(map(len, alone)) / num_packs,
                slowest_in_step([[of_packs[i] for i in of] for of in whole]) / mean,
                slowest_in_step(waiting) / mean,
            )
        )
    dealt, whole_packs, floor, cut, microbatches, loose, in_step = map(
        statistics.mean, zip(*steps, strict=True)
    )
    return Balance(
        longest_text=longest,
        dp_size=dp_size,
        dealt=dealt,
        whole=whole_packs,
        floor=floor,
        cut=cut,
        worst=max(each[3] for each in steps),
        microbatches=microbatches,
        loose=loose,
        in_step=in_step,
    )


def imbalance(costs: Sequence[float], ranks: Iterable[Iterable[int]]) -> float:
    """Highest cost of a rank over the mean."""
    loads = [sum(costs[i] for i in packs) for packs in ranks]
    return max(loads) / statistics.mean(loads)


def slowest_in_step(ranks: Sequence[Sequence[float]]) -> float:
    """Highest cost of a group of ranks in which each microbatch waits for the most expensive."""
    return max(
        sum(map(max, zip(*group, strict=True))) for group in itertools.batched(ranks, IN_STEP)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print two tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-samples", type=int, default=200_000, help="samples of the mixture")
    parser.add_argument(
        "--num-steps", type=int, default=30, help="steps over which balance is averaged"
    )
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args(arguments)
    print("text  window  visual    fill  possible  of tiles  packs/s  tokens/s")
    packed = []
    windows = [(1.0, window) for window in (64, 128, 256, 512, 1024)]
    for text, window in [*windows, *((text, 512) for text in (0.6, 0.5, 0.35, 0.3))]:
        row = measure_packing(mixture_folder(options.num_samples, text=text), window=window)
        packed.append({"text": text, **asdict(row)})
        print(
            f"{text:4.2f}  {row.window:6}  {row.visual:6.1%}  {row.fill:6.2%}  {row.possible:8.2%}"
            f"  {row.tile_fill:8.2%}  {row.packs_per_s:7,.0f}  {row.tokens_per_s:8.1e}"
        )
    print(
        "longest text  ranks  dealt  whole  floor    cut  worst  microbatches a pack"
        "  in step: loose  matched"
    )
    balanced = []
    for longest, dp_size in itertools.product((8192, 32768), (8, 64)):
        balance = measure_balance(
            num_samples=options.num_samples,
            longest=longest,
            dp_size=dp_size,
            num_steps=options.num_steps,
        )
        balanced.append(asdict(balance))
        print(
            f"{longest:12,}  {dp_size:5}  {balance.dealt:5.3f}  {balance.whole:5.3f} "
            f" {balance.floor:5.3f}  {balance.cut:5.3f}  {balance.worst:5.3f} "
            f" {balance.microbatches:19.3f}  {balance.loose:14.3f}  {balance.in_step:7.3f}"
        )
    fill = next(row["fill"] for row in packed if row["visual"] >= 0.8)
    print(
        f"fill at 80 % visual tokens: {fill:.2%}, goal {FILL_GOAL:.0%}: {_met(fill >= FILL_GOAL)}"
    )
    alone, waiting = balanced[-1]["cut"], balanced[-1]["in_step"]
    print(
        f"busiest of 64 ranks, texts up to 32,768 tokens: {alone:.3f} of the mean, where {IN_STEP}"
        f" share experts {waiting:.3f}, goal {BALANCE_GOAL}:"
        f" {_met(max(alone, waiting) <= BALANCE_GOAL)}"
    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        tables = {"packing": packed, "balance": balanced}
        options.json.write_text(json.dumps(tables, indent=2) + "\n")


def _met(reached: bool) -> str:
    return "met" if reached else "NOT met"


if __name__ == "__main__":
    main()
