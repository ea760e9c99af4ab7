"""Runs a scaling sweep and twice the whole chain on a SLURM of two virtual nodes, the second time
with three faults: a rank is killed, the job is preempted, and it is signalled as before its time
limit. Losses, exported weights and scores must be the same to the last digit.

Run as root: python -m tests.slurm [FOLDER]    (make test-slurm; needs slurm-wlm and munge)
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

from megatron_vico.checkpoint.run_folder import latest_iteration
from tests.slurm.cluster import NODES, Cluster, lacking, running, wait_for
from tests.training_runs import ToyData, make_toy_data, read_metrics, toy_settings, untimed

ROOT = Path(__file__).parents[2]
STAGES = {"warmup": 16, "consistency": 16, "router": 16}
STEPS = ("convert", *STAGES, "export", "evaluate")
CHAIN_LIMIT_S = 600


def main() -> int:
    """Both chains, and what differs."""
    reason = lacking()
    if reason is not None:
        print(f"make test-slurm cannot run here: {reason}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the daemons end too
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="vico_slurm_"))
    print(f"all files: {folder}", flush=True)
    inputs = make_inputs(folder / "inputs")
    cluster_folder = folder / "cluster"
    cluster_folder.mkdir(parents=True)
    with running(cluster_folder) as cluster:
        sweep(cluster, folder / "sweep", inputs)
        plain = run_chain(cluster, folder / "plain", inputs, faults={})
        faults = {"warmup": kill_rank, "consistency": preempt, "router": signal_job}
        faulty = run_chain(cluster, folder / "faulty", inputs, faults=faults)
    for stage in STAGES:
        losses = [[untimed(row) for row in read_metrics(each / stage)] for each in (plain, faulty)]
        assert losses[0] == losses[1], stage
    scores = [json.loads((each / "scores.json").read_text()) for each in (plain, faulty)]
    assert scores[0] == scores[1]
    vico("checkpoint", "inspect", plain / "flash", "--diff", faulty / "flash")
    print("the same with the faults and without: losses and gradient norms of", end=" ")
    print(f"{sum(STAGES.values())} steps, exported weights, scores")
    return 0


def make_inputs(folder: Path) -> ToyData:
    """Shards, a Hugging Face checkpoint and questions."""
    data = make_toy_data(folder)
    rows = (folder / "raw").glob("*.jsonl")
    lines = [json.loads(line) for line in next(rows).read_text().splitlines()[:8]]
    for line in lines:
        line["metrics"] = ["exact" for turn in line["conversations"] if turn["from"] == "human"]
    questions = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "raw" / "questions.jsonl").write_text(questions)
    start = {
        "stage": "pretrain",
        "train_iters": 2,
        "lr_warmup_iters": 0,
        "save": str(folder / "start"),
    }
    (folder / "start.yaml").write_text(yaml.safe_dump(recipe(data) | start))
    vico("train", "--recipe", folder / "start.yaml")
    words = ("--from", "megatron", "--to", "hf", "--layout", "internvl")
    words += ("--tokenizer-model", str(data.tokenizer))
    vico("convert", *words, "--input", folder / "start", "--output", folder / "model")
    return data


def recipe(data: ToyData) -> dict[str, Any]:
    """What all toy stages share."""
    own = {"model_size": "toy", "num_workers": 1, "lr_warmup_iters": 2, "save_interval": 3}
    return toy_settings(data) | own


def sweep(cluster: Cluster, folder: Path, inputs: ToyData) -> None:
    """examples/scaling/sweep.sh as arrays: one case on a node, two on both."""
    folder.mkdir()
    (folder / "toy.yaml").write_text(yaml.safe_dump(recipe(inputs) | {"stage": "pretrain"}))
    cases = {"one": 1, "two": 2, "both": 2}
    lines = (f"{name}\ttoy\t{nodes}\t{folder}/toy.yaml\n" for name, nodes in cases.items())
    (folder / "cases.tsv").write_text("".join(lines))
    settings = {"RUNS": folder, "STEPS": 3, "GPUS_PER_NODE": 1, "GPU": "none"}
    settings |= {"PYTHON": sys.executable, "PYTHONPATH": ROOT, "MASTER_ADDR": "127.0.0.1"}
    settings |= {"CUDA_VISIBLE_DEVICES": ""}
    submit(cluster, ["examples/scaling/sweep.sh", folder / "cases.tsv"], settings)
    queue = partial(cluster.ask, "squeue", "--noheader")
    wait_for(lambda: not queue(), "the sweep's arrays", limit_s=CHAIN_LIMIT_S)
    ranks = [read_metrics(folder / "toy" / name)[-1]["world_size"] for name in cases]
    assert ranks == [1, 2, 2], ranks


def submit(cluster: Cluster, command: list[str | Path], settings: dict[str, Any]) -> str:
    """Run a launcher outside of any job, at the repository's root: what it prints."""
    environment = cluster.environment | {name: str(value) for name, value in settings.items()}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def run_chain(
    cluster: Cluster,
    folder: Path,
    inputs: ToyData,
    *,
    faults: dict[str, Callable[[Cluster, str], None]],
) -> Path:
    """Submit the chain with the launcher, do each fault once its stage has made some steps, and
    wait for the end: the folder of its results."""
    recipes = folder / "recipes"
    recipes.mkdir(parents=True)
    start = str(folder / "start")
    for stage, before in zip(STAGES, ("start", "warmup", "consistency"), strict=True):
        own = {"stage": stage, "train_iters": STAGES[stage], "reference_load": start}
        own |= {"pretrained_checkpoint": str(folder / before)}
        own |= {"save": str(folder / stage), "load": str(folder / stage)}
        (recipes / f"{stage}.yaml").write_text(yaml.safe_dump(recipe(inputs) | own))
    raw = inputs.shards.parent / "raw"
    settings = {
        **{"RECIPES": recipes, "PYTHON": sys.executable, "PYTHONPATH": ROOT, "NAME": "toy"},
        **{"GPU": "none", "NODES": NODES, "ROUTER_NODES": NODES, "GPUS_PER_NODE": 1},
        **{"DATA": inputs.shards, "TOKENIZER": inputs.tokenizer, "LOGS": folder / "logs"},
        **{"MODEL": inputs.shards.parent / "model", "EXPORT": folder / "flash"},
        **{"QUESTIONS": raw / "questions.jsonl", "SCORES": folder / "scores.json"},
        **{"EXPORT_FLAGS": "--max-dynamic-patch 4", "TIME": "30", "SAVE_S": 60},
        **{"EVALUATE_FLAGS": "--max-dynamic-patch 4 --max-new-tokens 4"},
        # The names of virtual nodes are in no hosts file.
        **{"MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""},
    }
    began = time.monotonic()
    printed = submit(cluster, ["examples/slurm/vico.sh"], settings)
    jobs = dict(line.split(": job ") for line in printed.splitlines() if ": job " in line)
    assert tuple(jobs) == STEPS, printed
    for stage, fault in faults.items():
        save = folder / stage
        wait_for(partial(saved_some, save), f"{save} to be under way", limit_s=CHAIN_LIMIT_S)
        fault(cluster, jobs[stage])
    wait_for(lambda: has_ended(cluster, jobs), f"{folder.name} chain", limit_s=CHAIN_LIMIT_S)
    for step, job in jobs.items():
        fields = cluster.job(job)
        restarts, expected = int(fields["Restarts"]), int(step in faults)
        print(f"{folder.name} {step}: job {job} {fields['JobState']}, {restarts} restarts")
        assert (fields["JobState"], restarts) == ("COMPLETED", expected), fields
    print(f"{folder.name}: {time.monotonic() - began:.0f} s", flush=True)
    return folder


def saved_some(save: Path) -> bool:
    """Whether a stage has a checkpoint, so that what it made after it will be made again."""
    return latest_iteration(save) is not None


def has_ended(cluster: Cluster, jobs: dict[str, str]) -> bool:
    """Whether all jobs are completed, or one never will be."""
    states = {cluster.job(job)["JobState"] for job in jobs.values()}
    return states == {"COMPLETED"} or not states <= {
        "COMPLETED",
        "COMPLETING",
        "RUNNING",
        "PENDING",
    }


def kill_rank(cluster: Cluster, job: str) -> None:
    """SIGKILL to rank 1, as the kernel does when memory is short."""
    ranks = [
        process
        for process in psutil.process_iter(["environ", "cmdline", "ppid"])
        if "train" in (process.info["cmdline"] or [])
        and (process.info["environ"] or {}).get("SLURM_JOB_ID") == job
        and process.info["environ"].get("RANK") == "1"
    ]
    # Its loader's workers look the same.
    (rank,) = [each for each in ranks if each.info["ppid"] not in {other.pid for other in ranks}]
    rank.kill()


def preempt(cluster: Cluster, job: str) -> None:
    """A job of a partition that goes first takes the nodes: SIGTERM, grace time, back in line."""
    words = ("--partition=urgent", f"--nodes={NODES}", "--exclusive", "--output=/dev/null")
    cluster.ask("sbatch", *words, "--wrap=true")


def signal_job(cluster: Cluster, job: str) -> None:
    """What --signal does before the time limit."""
    cluster.ask("scancel", "--signal=TERM", job)


def vico(*words: object) -> None:
    """A command that must succeed."""
    command = [sys.executable, "-W", "ignore", "-m", "megatron_vico", *map(str, words)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    sys.exit(main())
