#!/usr/bin/env python3
"""Samples per second of CPU time of the loader in one process, for the demo's kind of sample and for full-size images.

    python benchmarks/loader.py --out runs/loader.json

The demo's kind: a 64x64 px PNG, 4 tiles of 32 px, 4 questions and answers, packs of 32 samples. Full size: a 1344x896
px JPEG, 6 tiles of 448 px and the thumbnail, one question. Data are made in a temporary folder. Wall time is not used:
other work on the machine does not count.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from megatron_vico.config.schema import STAGES, DataOptions, Stage
from megatron_vico.data.encoding import EncodingSettings, SampleEncoder
from megatron_vico.data.loader import make_loader
from megatron_vico.data.pack_builder import PackBuilder
from megatron_vico.data.shard_writer import WriterOptions, make_shards
from megatron_vico.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of sample and how it is packed."""

    name: str
    size: tuple[int, int]
    suffix: str
    num_questions: int
    num_samples: int
    tokens_kept: int
    tokens_compressed: int
    image_size: int
    data: DataOptions


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of the table."""

    name: str
    stage: Stage
    samples_per_s: float
    tiles_per_s: float


DEMO = Case(
    name="demo",
    size=(64, 64),
    suffix="png",
    num_questions=4,
    num_samples=1024,
    tokens_kept=4,
    tokens_compressed=1,
    image_size=32,
    data=DataOptions(
        seq_length=8192,
        max_tiles_per_pack=256,
        max_samples_per_pack=32,
        max_dynamic_patch=4,
        use_thumbnail=False,
        tile_tags="numbered",
        num_workers=0,
    ),
)
FULL_SIZE = Case(
    name="full size",
    size=(1344, 896),
    suffix="jpg",
    num_questions=1,
    num_samples=64,
    tokens_kept=256,
    tokens_compressed=64,
    image_size=448,
    data=DataOptions(num_workers=0),
)


def write_samples(case: Case, folder: Path) -> Path:
    """Images of smooth noise and questions about them; returns the JSONL file."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(case.num_samples):
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        name = f"{number}.{case.suffix}"
        Image.fromarray(coarse).resize(case.size, Image.Resampling.BICUBIC).save(folder / name)
        turns = [{"from": "system", "value": "Read the tiles."}]
        for question in range(case.num_questions):
            turns.append({"from": "human", "value": f"What is in tile {question + 1}?"})
            turns.append({"from": "gpt", "value": str(rng.integers(1, 10000))})
        rows.append(json.dumps({"image": name, "conversations": turns}))
    path = folder / "samples.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


def measure(case: Case, *, stage: Stage, shards: Path, tokenizer: Tokenizer, num_samples: int) -> Measured:
    """Take steps of one pack until `num_samples` samples were seen; the first step is not counted."""
    data = DataOptions(**{**vars(case.data), "data_path": (str(shards),)})
    builder = PackBuilder(
        stage=stage,
        seed=0,
        tokens_kept=case.tokens_kept,
        tokens_compressed=case.tokens_compressed,
        image_token_id=tokenizer.image_token_id,
    )
    settings = EncodingSettings.from_options(data, image_size=case.image_size)
    encoder = SampleEncoder(tokenizer=tokenizer, settings=settings)
    loader = make_loader(data, encoder=encoder, builder=builder, global_batch_size=1)
    steps = iter(loader)
    next(steps)
    seen, tiles, start = 0, 0, time.process_time()
    while seen < num_samples:
        for batch in next(steps):
            seen += len(batch.keys)
            tiles += len(batch.tiles)
    elapsed_s = time.process_time() - start
    return Measured(name=case.name, stage=stage, samples_per_s=seen / elapsed_s, tiles_per_s=tiles / elapsed_s)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every stage for both kinds of sample, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for case in (DEMO, FULL_SIZE):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            tokenizer = load_tokenizer(train_sentencepiece(["What is in tile 1?"], model_prefix=folder / "tok"))
            make_shards(
                write_samples(case, folder),
                image_root=folder,
                out_dir=folder / "shards",
                tokenizer=tokenizer,
                settings=EncodingSettings.from_options(case.data, image_size=case.image_size),
                options=WriterOptions(show_progress=False),
            )
            for stage in STAGES:
                rows.append(
                    measure(
                        case,
                        stage=stage,
                        shards=folder / "shards",
                        tokenizer=tokenizer,
                        num_samples=2 * case.num_samples,
                    )
                )
                row = rows[-1]
                print(f"{row.name:10} {row.stage:12} {row.samples_per_s:8.0f} samples/s {row.tiles_per_s:8.0f} tiles/s")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
