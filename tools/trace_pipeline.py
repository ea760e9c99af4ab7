#!/usr/bin/env python3
"""Draws who does what when in a consistency step on four pipeline stages, as recorded.

Run: python tools/trace_pipeline.py --output docs/images/pp4_step.png

Four processes train toy-6b, a layer each, on packs of the demo's data; nothing is simulated.
Commands are shown as they run and can be run by themselves.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_vico.training.profiler import trace_folder

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "quickstart"
STAGES = 4


def commands(folder: Path, picture: Path, *, step: int) -> Iterator[list[str]]:
    """What makes the picture, in order: one command line each.

    Args:
        folder: for data, checkpoints and the trace.
        picture: file to write.
        step: which step is recorded; the first ones are slower.
    """
    tokenizer, data, start, run = (folder / name for name in ("demo.model", "data", "start", "run"))
    python, module = [sys.executable], ["-m", "megatron_vico"]
    launched = [
        *python,
        "-m",
        "torch.distributed.run",
        "--standalone",
        *_flags(nproc_per_node=STAGES),
    ]
    tiling = [*_flags(max_dynamic_patch=4, tile_tags="numbered"), "--no-use-thumbnail"]
    source = _flags(model_size="toy-6b", tokenizer_model=tokenizer)
    train = ["train", *source, *_flags(data_path=folder / "shards", lr_warmup_iters=0, load="none")]
    recipes = DEMO / "recipes"
    yield [*python, f"{DEMO}/make_data.py", "--quick", *_flags(out=data)]
    yield [*python, f"{DEMO}/make_tokenizer.py", *_flags(text=data / "text.txt", out=tokenizer)]
    made = _flags(jsonl=data / "train.jsonl", out=folder / "shards")
    yield [*python, *module, "shards", "make", *made, *source, *tiling]
    yield [
        *python,
        *module,
        *train,
        *_flags(recipe=recipes / "pretrain.yaml"),
        *_flags(train_iters=1, save=start),
    ]
    layout = _flags(pipeline_model_parallel_size=STAGES, global_batch_size=8)
    profile = ["--profile", *_flags(profile_step_start=step - 1, profile_step_end=step)]
    saved = _flags(pretrained_checkpoint=start, save=run, train_iters=step)
    train += _flags(recipe=recipes / "consistency.yaml")
    yield [*launched, *module, *train, *saved, *layout, *profile]
    title = (
        f"A step of consistency training, 8 packs on {STAGES} pipeline stages ({os.cpu_count()} CPU"
        " cores)"
    )
    plotted = _flags(title=title, output=picture)
    yield [*python, *module, "plot", "trace", str(trace_folder(str(run), step)), *plotted]


def _flags(**values: object) -> list[str]:
    """`--name value` for each."""
    return [
        word
        for name, value in values.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def main() -> None:
    """Run the commands; an error of one ends it all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs/images/pp4_step.png", help="picture to write"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "runs/trace",
        help="folder for data, checkpoints and trace",
    )
    parser.add_argument("--step", type=int, default=10, help="which step is recorded")
    args = parser.parse_args()
    picture, work = args.output.resolve(), args.work.resolve()
    picture.parent.mkdir(parents=True, exist_ok=True)
    # One thread a process, no GPU: the picture is of the schedule, not of a machine.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    for command in commands(work, picture, step=args.step):
        print(f"$ {shlex.join(command)}", flush=True)
        subprocess.run(command, cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    main()
