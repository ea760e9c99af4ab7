"""The SLURM launcher of the largest model, without SLURM: its check mode and what it starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "examples" / "vico_241b.sh"

# Stands in for srun and scontrol: writes the words it was called with, one a line.
RECORDER = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'node-07\\nnode-08\\n'
else printf '%s\\n' "${0##*/}" "$@" >>"$CALLS"; fi
"""


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script in a shell that knows of no SLURM but what is given."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        ["bash", str(SCRIPT), *words],
        capture_output=True,
        text=True,
        env={
            **inherited,
            "PYTHONPATH": str(ROOT),
            "PYTHON": sys.executable,
            "SLURM_SUBMIT_DIR": str(ROOT),
            **environment,
        },
        check=False,
    )


def test_the_layouts_of_the_three_stages_pass_without_slurm_and_gpus() -> None:
    done = run(CHECK="1")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("OK: ")]
    assert [line.split(": ")[1] for line in lines] == [
        f"stage {stage} of internvl3_5-241b-a28b on {ranks} ranks"
        for stage, ranks in (("warmup", 128), ("consistency", 128), ("router", 16))
    ]
    assert (
        "tensor 2 x pipeline 8 x context 1 x data 8, 4 chunks a stage, expert 8 x expert tensor 1"
        in lines[1]
    )
    assert "32 microbatches" in lines[1]
    assert "tensor 2 x pipeline 2 x context 1 x data 4, expert 8" in lines[2]


def test_a_number_of_nodes_that_cannot_work_is_refused_with_those_that_do() -> None:
    done = run("consistency", CHECK="1", NODES="15")
    assert done.returncode == 2
    assert (
        "world size 120 is not a multiple of tensor 2 x pipeline 8 x context 1 = 16 ranks"
        in done.stderr
    )
    assert "use 64 or 128 ranks" in done.stderr


def test_unknown_stages_are_refused() -> None:
    done = run("pretrain", CHECK="1")
    assert done.returncode == 2
    assert "unknown stage 'pretrain', expected warmup, consistency, router" in done.stderr


def run_in_job(folder: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The script in a job of two nodes, and what it called of SLURM."""
    for name in ("srun", "scontrol"):
        (folder / name).write_text(RECORDER)
        (folder / name).chmod(0o755)
    (folder / "calls").write_text("")
    done = run(
        *words,
        PATH=f"{folder}:{os.environ['PATH']}",
        CALLS=str(folder / "calls"),
        **{
            "SLURM_JOB_ID": "11",
            "SLURM_JOB_NODELIST": "node-[07-08]",
            "DATA": str(folder),
            "TOKENIZER": str(folder),
        },
    )
    return done, (folder / "calls").read_text().splitlines()


@pytest.mark.slow
def test_what_it_starts(tmp_path: Path) -> None:
    here = str(tmp_path)
    flags = ["--lr", "2e-4", "--save", here]
    flags += ["--pretrained-checkpoint", here, "--reference-load", here]
    done, calls = run_in_job(tmp_path, "router", "--", *flags)
    assert done.returncode == 0, done.stderr
    # Nothing was trained, as if the run had been told to stop: the job goes back in line.
    assert calls[-3:] == ["scontrol", "requeue", "11"]
    command = calls[:-3]
    assert command[0] == "srun"
    assert {"--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= set(command)
    from torch.distributed.run import parse_args

    # The words that srun's shell would start on the second node.
    shell = command[command.index("bash") :]
    assert shell[3] == sys.executable
    shell[3] = "echo"
    words = subprocess.check_output(
        shell, text=True, env={**os.environ, "SLURM_NODEID": "1"}
    ).split()
    launched = parse_args(words[words.index("torch.distributed.run") + 1 :])
    assert (launched.nnodes, launched.nproc_per_node, launched.max_restarts) == ("2", "8", 0)
    assert launched.rdzv_backend == "static"
    assert (launched.master_addr, launched.master_port) == ("node-07", 29500)
    assert launched.node_rank == 1
    assert "SIGTERM" not in launched.signals_to_handle.split(",")
    assert (launched.module, launched.training_script) == (True, "megatron_vico")
    assert launched.training_script_args == [
        *("train", "--recipe", "examples/recipes/internvl3_5_241b_a28b/router.yaml"),
        *("--data-path", here, "--tokenizer-model", here),
        *flags,
    ]


@pytest.mark.slow
def test_a_missing_file_is_named_once_before_the_ranks_are_started(tmp_path: Path) -> None:
    done, calls = run_in_job(
        tmp_path, "router", "--", "--pretrained-checkpoint", "gone", "--save", str(tmp_path)
    )
    assert done.returncode == 2
    assert calls == []
    assert (
        done.stderr.count("ConfigError: --pretrained-checkpoint gone: no such file or folder") == 1
    )


@pytest.mark.slow
def test_a_stage_that_is_done_is_skipped(base_checkpoint: Path, tmp_path: Path) -> None:
    """Another stage's checkpoint, of two steps, does: only the step counts."""
    flags = ["--lr-warmup-iters", "0", "--train-iters", "2", "--save", str(base_checkpoint)]
    done, calls = run_in_job(tmp_path, "router", "--", *flags)
    assert (done.returncode, calls) == (0, []), done.stderr
    assert "router is done already" in done.stderr
