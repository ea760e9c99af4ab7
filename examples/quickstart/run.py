"""The whole method at toy size on the CPU: data, five training stages, export, evaluation.

Run: python examples/quickstart/run.py            (make demo; at most 20 minutes on 2 cores)
     python examples/quickstart/run.py --quick    (make demo-quick; mechanics, not quality)
     python examples/quickstart/run.py --resume   (go on where an interrupted run stopped)

Every step is a command that can be run by itself; the driver prints it.
"""

import argparse
import io
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import sklearn
from tiles import PHOTO_FOLDER

HERE = Path(__file__).resolve().parent
PAGE_SCAN = PHOTO_FOLDER / "page.png"
PHOTOGRAPH = Path(sklearn.__file__).parent / "datasets" / "images" / "china.jpg"
ROOT = HERE.parents[1]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run takes, as measured."""

    minutes: int
    disk_mb: int
    memory_gb: float
    """Resident, of all processes together, at the most."""


FULL_NEEDS = Needs(minutes=18, disk_mb=440, memory_gb=3.3)
QUICK_NEEDS = Needs(minutes=3, disk_mb=150, memory_gb=3.3)

TILING = ("--max-dynamic-patch", "4", "--no-use-thumbnail", "--tile-tags", "numbered")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A training stage: its recipe has the same name."""

    name: str
    start: str | None
    """Stage whose checkpoint it starts from."""

    quick_iters: int
    """Steps under --quick: enough for the losses of pretrain and consistency to fall."""

    reference: str | None = None
    """Stage whose checkpoint is the frozen reference, where that is not `start`."""


STAGES = (
    Stage(name="pretrain", start=None, quick_iters=30),
    Stage(name="warmup", start="pretrain", quick_iters=6),
    Stage(name="consistency", start="warmup", quick_iters=30),
    Stage(name="router", start="consistency", quick_iters=8, reference="pretrain"),
    Stage(name="router_image", start="consistency", quick_iters=8, reference="pretrain"),
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One line of the demo's progress."""

    name: str
    command: Sequence[str]
    outputs: tuple[str, ...]
    """What it makes in the run's folder; removed before a run that does not resume."""

    shows: str
    """What a line of its output holds to be worth showing; all lines go to the log."""

    goes_on: bool = False
    """Whether it can go on from what an interrupted run has left; else that is removed first."""


def steps(run: Path, *, quick: bool, processes: int, seed: int) -> list[Step]:
    """The demo's steps in order; `quick` has a tenth of the data and few training steps."""
    tokenizer = run / "tokenizer" / "demo.model"
    make_data = _command(
        HERE / "make_data.py",
        "--out",
        run / "data",
        "--seed",
        seed,
        *(["--quick"] if quick else []),
    )
    make_tokenizer = _command(
        HERE / "make_tokenizer.py", "--text", run / "data" / "text.txt", "--out", tokenizer
    )
    make_shards = _command(
        *("-m", "megatron_vico", "shards", "make", "--jsonl", run / "data" / "train.jsonl"),
        *("--out", run / "shards", "--tokenizer-model", tokenizer, "--model-size", "toy", *TILING),
    )
    export = _command(
        "-m", "megatron_vico", "convert", "--input", run / "router", "--output", run / "flash"
    )
    export += ["--from", "megatron", "--to", "hf", "--layout", "flash"]
    evaluate = _command(HERE / "evaluate.py", "--run", run, "--seed", seed)
    results = ("results.json", "details.json", "table.txt", "table.md")
    pictures = ("routing.png", "loss.png", "by_content.png", "window.png")
    # All tiles are asked alone: the paper's rule.
    draw = _command(ROOT / "tools" / "visualize_routing.py", "--load", run / "flash")
    draw += ["--router-rule", "paper"]
    # 3x4 tiles, as in Figure 5 of the paper.
    overlay = [*draw, "--layout", "3x4", "--max-dynamic-patch", "12", "--tile-px", "144"]
    overlay += ["--output", f"{run / 'overlay.png'}", f"{PAGE_SCAN}", f"{PHOTOGRAPH}"]
    page = run / "page.png"
    routed_page = [*draw, "--max-dynamic-patch", "24", "--output", f"{run / 'routed_page.png'}"]
    return [
        Step(name="data", command=make_data, outputs=("data",), shows="images;"),
        Step(name="tokenizer", command=make_tokenizer, outputs=("tokenizer",), shows="pieces"),
        Step(name="shards", command=make_shards, outputs=("shards",), shows="samples in"),
        *(
            _train(stage, run, quick=quick, processes=processes, seed=seed, tokenizer=tokenizer)
            for stage in STAGES
        ),
        Step(name="export", command=export, outputs=("flash",), shows="flash"),
        Step(name="evaluation", command=evaluate, outputs=results + pictures, shows=" test images"),
        Step(name="overlay", command=overlay, outputs=("overlay.png",), shows="compressed"),
        Step(
            name="page",
            command=_command(HERE / "page.py", "--out", page),
            outputs=(page.name,),
            shows="tiles",
        ),
        Step(
            name="routed_page",
            command=[*routed_page, f"{page}"],
            outputs=("routed_page.png",),
            shows="compressed",
        ),
    ]


def _train(
    stage: Stage, run: Path, *, quick: bool, processes: int, seed: int, tokenizer: Path
) -> Step:
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    command = _command(*(ranks if processes > 1 else ()), "-m", "megatron_vico", "train")
    command += ["--recipe", f"{HERE / 'recipes' / stage.name}.yaml"]
    command += [
        "--seed",
        f"{seed}",
        "--data-path",
        f"{run / 'shards'}",
        "--tokenizer-model",
        f"{tokenizer}",
    ]
    command += ["--save", f"{run / stage.name}", "--load", f"{run / stage.name}"]
    if stage.start is not None:
        command += ["--pretrained-checkpoint", f"{run / stage.start}"]
    if stage.reference is not None:
        command += ["--reference-load", f"{run / stage.reference}"]
    if quick:
        command += [
            "--train-iters",
            f"{stage.quick_iters}",
            "--lr-warmup-iters",
            "5",
            "--log-interval",
            "10",
        ]
    return Step(
        name=stage.name, command=command, outputs=(stage.name,), shows="] iteration ", goes_on=True
    )


def _command(*words: object) -> list[str]:
    return [sys.executable, *(str(word) for word in words)]


def main() -> int:
    """Run all steps, then show the table and where everything is.

    Returns:
        Exit status: that of the step that failed, or 0.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the data and few steps: mechanics only"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what an interrupted run has finished"
    )
    parser.add_argument(
        "--out", type=Path, help="folder to write to; unset, runs/demo or runs/demo-quick"
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="training processes; losses do not depend on it"
    )
    parser.add_argument(
        "--seed", type=int, default=1234, help="of data, initialisation, order and plans"
    )
    args = parser.parse_args()
    run = (args.out or ROOT / "runs" / ("demo-quick" if args.quick else "demo")).resolve()
    all_steps = steps(run, quick=args.quick, processes=args.processes, seed=args.seed)
    (run / "logs").mkdir(parents=True, exist_ok=True)
    if not _announce(run, len(all_steps), quick=args.quick, resume=args.resume):
        return 2
    if not args.resume:
        for step in all_steps:
            _forget(step, run)
    started = time.perf_counter()
    times = []
    for number, step in enumerate(all_steps, start=1):
        title = f"[{number}/{len(all_steps)}] {step.name}"
        if _done_mark(step, run).exists() or (args.resume and _is_finished(step)):
            print(f"{title}: done already", flush=True)
            continue
        print(f"\n{title}\n$ {shlex.join(step.command)}", flush=True)
        if not step.goes_on:
            _forget(step, run)
        began = time.perf_counter()
        status = execute(step, run)
        if status:
            print(
                f"\nstep {step.name!r} failed with status {status}; its log:"
                f" {run / 'logs' / step.name}.log"
            )
            words = [word for word in sys.argv if word != "--resume"]
            print(f"Mend the cause and go on with: python {shlex.join(words)} --resume", flush=True)
            return status
        _done_mark(step, run).touch()
        times.append((step.name, time.perf_counter() - began))
        print(
            f"{step.name}: {times[-1][1]:.0f} s, {time.perf_counter() - started:.0f} s in all",
            flush=True,
        )
    print("\n" + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in times))
    _report(run)
    return 0


def _announce(run: Path, num_steps: int, *, quick: bool, resume: bool) -> bool:
    """Say what the demo does and needs; False if the disk has no room for it."""
    needs = QUICK_NEEDS if quick else FULL_NEEDS
    print(
        f"{num_steps} steps: images and conversations are drawn, a toy InternVL is trained through"
        f" {len(STAGES)} stages, exported and evaluated.\nOn 2 idle cores about {needs.minutes}"
        f" minutes; {needs.disk_mb} MB of disk in {run}, {needs.memory_gb:.1f} GB of memory, no"
        " GPU, no network.\nInterrupted, it goes on with --resume.",
        flush=True,
    )
    free_mb = shutil.disk_usage(run).free // 10**6
    if resume or free_mb >= needs.disk_mb:
        return True
    print(f"{run}: only {free_mb} MB of disk are free; make room, or name another folder by --out.")
    return False


def execute(step: Step, run: Path) -> int:
    """Run one step's command: all output to its log, what is worth showing to the terminal.

    Returns:
        The command's exit status.
    """
    # No GPU: the demo is the same on every machine. One thread a process: there are two cores.
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    tail: list[str] = []
    full_bar = ""
    with open(run / "logs" / f"{step.name}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert process.stdout is not None
        # newline="": a progress bar's carriage return ends a line too, and is told apart.
        for line in io.TextIOWrapper(
            process.stdout, encoding="utf-8", errors="replace", newline=""
        ):
            text = line.strip()
            title, bar, _ = text.partition("%|")
            if bar and sys.stdout.isatty():
                print(f"\r  {text}\033[K", end="", flush=True)
            if not text or (bar and (not title.endswith("100") or title == full_bar)):
                continue  # of a progress bar the log gets only the end, once
            full_bar = title if bar else full_bar
            log.write(text + "\n")
            tail = [*tail[-29:], text]
            if step.shows in text or (bar and not sys.stdout.isatty()):
                print(f"  {text}", flush=True)
            elif bar:
                print(flush=True)
        status = process.wait()
    if status:
        print("\n".join(tail), flush=True)
    return status


def _report(run: Path) -> None:
    print("\n" + (run / "table.txt").read_text(encoding="utf-8"))
    for name, what in (
        ("results.json", "the table, as fractions"),
        ("details.json", "scores and compression by kind of tile"),
        ("routing.png", "which tiles the router compresses"),
        ("by_content.png", "compressed tiles by what they show"),
        ("overlay.png", "decisions about a page scan and a photograph of 3x4 tiles"),
        ("routed_page.png", "decisions about a page with a photograph, a chart and figures"),
        ("loss.png", "losses of the five stages"),
        ("window.png", "loss ratios and their threshold over router training"),
        ("flash", "the exported InternVL3.5-Flash checkpoint"),
    ):
        print(f"{run / name}  {what}")


def _done_mark(step: Step, run: Path) -> Path:
    return run / "logs" / f"{step.name}.done"


def _is_finished(step: Step) -> bool:
    """Whether a stage has its last checkpoint: it was killed before it could be marked."""
    if "train" not in step.command:
        return False
    flags = step.command[step.command.index("train") + 1 :]
    status = _command("-m", "megatron_vico", "status", *flags)
    return subprocess.run(status, cwd=ROOT, capture_output=True, check=False).returncode == 0


def _forget(step: Step, run: Path) -> None:
    _done_mark(step, run).unlink(missing_ok=True)
    for name in step.outputs:
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
