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
    """What makes the picture, in order.

    Args:
        folder: for data, checkpoints and the trace.
        picture: file to write.
        step: which step is recorded; the first ones are slower.

    Yields:
        One command line each.
    """
    tokenizer, data, start, run = (folder / name for name in ("demo.model", "data", "start", "run"))
    vico = [sys.executable, "-m", "megatron_vico"]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(STAGES),
    ]
    source = ["--model-size", "toy-6b", "--tokenizer-model", str(tokenizer)]
    yield [sys.executable, str(DEMO / "make_data.py"), "--quick", "--out", str(data)]
    yield [
        *(
            sys.executable,
            str(DEMO / "make_tokenizer.py"),
            "--text",
            str(data / "text.txt"),
            "--out",
            str(tokenizer),
        )
    ]
    yield [
        *(
            *vico,
            "shards",
            "make",
            "--jsonl",
            str(data / "train.jsonl"),
            "--out",
            str(folder / "shards"),
            *source,
        ),
        *("--max-dynamic-patch", "4", "--no-use-thumbnail", "--tile-tags", "numbered"),
    ]
    train = ["train", *source, "--data-path", str(folder / "shards"), "--lr-warmup-iters", "0"]
    yield [
        *(*vico, *train, "--recipe", str(DEMO / "recipes" / "pretrain.yaml"), "--train-iters", "1"),
        *("--save", str(start), "--load", "none"),
    ]
    yield [
        *(*launch, *vico[1:], *train, "--recipe", str(DEMO / "recipes" / "consistency.yaml")),
        *(
            "--pretrained-checkpoint",
            str(start),
            "--save",
            str(run),
            "--load",
            "none",
            "--train-iters",
            str(step),
        ),
        *("--pipeline-model-parallel-size", str(STAGES), "--global-batch-size", "8"),
        *("--profile", "--profile-step-start", str(step - 1), "--profile-step-end", str(step)),
    ]
    title = (
        f"A step of consistency training, 8 packs on {STAGES} pipeline stages ({os.cpu_count()} CPU"
        " cores)"
    )
    trace = trace_folder(str(run), step)
    yield [*vico, "plot", "trace", str(trace), "--title", title, "--output", str(picture)]


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
