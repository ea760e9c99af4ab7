#!/usr/bin/env python3
"""What the loader prepares per second and core, and how long a training loop waits for it.

    python benchmarks/loader.py --out runs/loader.json

Two kinds of sample, made in a temporary folder. The demo's: a 64x64 px PNG, 4 tiles of 32 px, 4
questions and answers, packs of 32 samples. Full size: a 1344x896 px JPEG, 6 tiles of 448 px and the
thumbnail, one question.

The first table is of one process: CPU time, so that other work on the machine does not count. MB
are those of encoded images. The second one trains the toy model (for full size with tiles of 448
px, of which each takes 1,024 patches) from a loader with workers: what a core's consistency step
consumes, how many times as much a core's loader prepares, and the share of the loop's wall time in
which the step waits for its batch, which other work on the machine raises.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Run as a script, only this folder is on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_vico import cpu_stand_in

cpu_stand_in.install()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks.runs import build_run, stage_config  # noqa: E402
from megatron_vico.config.flags import parse  # noqa: E402
from megatron_vico.config.registry import ModelConfig, get_model_config  # noqa: E402
from megatron_vico.config.schema import DataOptions  # noqa: E402
from megatron_vico.config.stages import STAGES, Stage  # noqa: E402
from megatron_vico.data.encode.sample_encoder import EncodingSettings, SampleEncoder  # noqa: E402
from megatron_vico.data.encode.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece  # noqa: E402
from megatron_vico.data.load.loader import Loader, open_plan  # noqa: E402
from megatron_vico.data.pack.builder import PackBuilder  # noqa: E402
from megatron_vico.parallel.batch import share_step  # noqa: E402
from megatron_vico.parallel.groups import Groups, started  # noqa: E402
from megatron_vico.shard_tools.options import WriterOptions  # noqa: E402
from megatron_vico.shard_tools.writer import make_shards  # noqa: E402
from megatron_vico.training import trainer  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of sample and how it is packed."""

    name: str
    size: tuple[int, int]
    suffix: str
    num_questions: int
    num_samples: int
    image_size: int
    patch_size: int
    data: DataOptions
    training_pack: dict[str, int]
    """Limits of a pack where the toy model trains on it, if they are others."""

    def model(self) -> ModelConfig:
        """The toy with this kind's tiles."""
        toy = get_model_config("toy")
        vision = dataclasses.replace(
            toy.vision, image_size=self.image_size, patch_size=self.patch_size
        )
        return dataclasses.replace(toy, vision=vision)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of the first table, per second of CPU time."""

    name: str
    stage: Stage
    samples_per_s: float
    tiles_per_s: float
    mb_per_s: float
    """Of encoded images."""


@dataclass(frozen=True, kw_only=True)
class Fed:
    """One row of the second table."""

    name: str
    num_workers: int
    num_steps: int
    consumed_per_s: float
    """Samples that the toy's step takes per second of CPU time."""

    lost_share: float
    """Wall time in which the step waits for a batch over all of it."""


DEMO = Case(
    name="demo",
    size=(64, 64),
    suffix="png",
    num_questions=4,
    num_samples=1024,
    image_size=32,
    patch_size=8,
    training_pack={},
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
    image_size=448,
    patch_size=14,
    training_pack={"max_tiles_per_pack": 14},
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


def loader_of(case: Case, data: DataOptions, *, stage: Stage, tokenizer: Tokenizer) -> Loader:
    """Of one pack a step."""
    model = case.model()
    builder = PackBuilder(
        stage=stage,
        seed=0,
        tokens_kept=model.visual_tokens_per_tile,
        tokens_compressed=model.compressed_tokens_per_tile,
        image_token_id=model.image_token_id,
    )
    settings = EncodingSettings.from_options(data, image_size=case.image_size)
    encoder = SampleEncoder(tokenizer=tokenizer, settings=settings)
    plan = open_plan(data, builder=builder, global_batch_size=1)
    return Loader(plan, encoder=encoder, builder=builder)


def measure(
    case: Case, *, stage: Stage, data: DataOptions, tokenizer: Tokenizer, num_samples: int
) -> Measured:
    """Take steps of one pack until `num_samples` samples were seen; the first is not counted."""
    loader = loader_of(case, data, stage=stage, tokenizer=tokenizer)
    (folder,) = loader.plan.data.folders
    described = [folder.describe(i) for i in range(len(folder))]
    image_bytes = {each.key: sum(size for _, size in each.members[1:]) for each in described}
    steps = iter(loader)
    next(steps)
    seen, tiles, read, start = 0, 0, 0, time.process_time()
    while seen < num_samples:
        for block in next(steps):
            keys = [key for pack in block.packs for key in pack.keys]
            seen += len(keys)
            tiles += len(block.tiles)
            read += sum(image_bytes[key] for key in keys)
    elapsed_s = time.process_time() - start
    return Measured(
        name=case.name,
        stage=stage,
        samples_per_s=seen / elapsed_s,
        tiles_per_s=tiles / elapsed_s,
        mb_per_s=read / elapsed_s / 1e6,
    )


def feed(
    case: Case,
    *,
    data: DataOptions,
    tokenizer: Tokenizer,
    num_workers: int,
    num_steps: int,
    groups: Groups,
) -> Fed:
    """Train the toy on steps of one pack from a loader with workers; the first is not counted."""
    cfg = stage_config(parse(["--num-workers", str(num_workers)]), "consistency")
    run = build_run(cfg, case.model(), groups)
    data = dataclasses.replace(data, num_workers=num_workers, **case.training_pack)
    steps = iter(loader_of(case, data, stage="consistency", tokenizer=tokenizer))
    wait_s = wall_s = cpu_s = 0.0
    samples = 0
    for number in range(num_steps + 1):
        begun = time.perf_counter()
        blocks = next(steps)
        taken, cpu = time.perf_counter(), time.process_time()
        batch = share_step(blocks, groups=groups)
        trainer.compute_gradients(run, batch)
        trainer.update_weights(run)
        if number:
            wait_s += taken - begun
            wall_s += time.perf_counter() - begun
            cpu_s += time.process_time() - cpu
            samples += sum(len(pack.keys) for pack in batch.packs)
    return Fed(
        name=case.name,
        num_workers=num_workers,
        num_steps=num_steps,
        consumed_per_s=samples / cpu_s,
        lost_share=wait_s / wall_s,
    )


def run_case(case: Case, options: argparse.Namespace, groups: Groups) -> tuple[list[Measured], Fed]:
    """Both tables' rows of one kind of sample, printed as they come."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = load_tokenizer(
            train_sentencepiece(["What is in tile 1?"], model_prefix=folder / "tok")
        )
        make_shards(
            write_samples(case, folder),
            image_root=folder,
            out_dir=folder / "shards",
            tokenizer=tokenizer,
            settings=EncodingSettings.from_options(case.data, image_size=case.image_size),
            options=WriterOptions(show_progress=False),
        )
        data = dataclasses.replace(case.data, data_path=(str(folder / "shards"),))
        num_samples = options.samples or 2 * case.num_samples
        for stage in STAGES:
            row = measure(
                case, stage=stage, data=data, tokenizer=tokenizer, num_samples=num_samples
            )
            rows.append(row)
            print(
                f"{row.name:10} {row.stage:12} {row.samples_per_s:8.0f} samples/s"
                f" {row.tiles_per_s:8.0f} tiles/s {row.mb_per_s:8.2f} MB/s per core"
            )
        fed = feed(
            case,
            data=data,
            tokenizer=tokenizer,
            num_workers=options.num_workers,
            num_steps=options.steps,
            groups=groups,
        )
    prepared = next(row.samples_per_s for row in rows if row.stage == "consistency")
    print(
        f"{fed.name:10} {fed.consumed_per_s:.1f} samples/s per core go through the toy's step; a"
        f" core prepares {prepared / fed.consumed_per_s:.1f} times as many;"
        f" {fed.num_workers} workers, {fed.num_steps} steps:"
        f" {fed.lost_share:.2%} of the time lost to data"
    )
    return rows, fed


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every stage for both kinds of sample, print tables, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument(
        "--samples", type=int, help="samples to read for each row; unset, two epochs"
    )
    parser.add_argument(
        "--steps", type=int, default=12, help="steps of the toy for each kind of sample"
    )
    parser.add_argument("--num-workers", type=int, default=1, help="workers that feed the toy")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    prepared, fed = [], []
    cfg = parse([])
    with started(cfg.parallel, seed=cfg.training.seed, timeout_minutes=10) as groups:
        for case in (DEMO, FULL_SIZE):
            rows, row = run_case(case, options, groups)
            prepared += rows
            fed.append(row)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        tables = {
            "prepared": [asdict(row) for row in prepared],
            "fed": [asdict(row) for row in fed],
        }
        options.out.write_text(json.dumps(tables, indent=2) + "\n")


if __name__ == "__main__":
    main()
