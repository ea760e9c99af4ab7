"""The SLURM launcher without SLURM: its checks, the jobs it submits, what it starts in a job, and
what it makes of each end. tests/slurm runs it on a SLURM."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run_folders import write_step

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "examples" / "vico_241b.sh"
SCRIPTS = [SCRIPT, *(ROOT / "examples" / "slurm").glob("*.sh")]

# Stands in for srun and scontrol: writes the words it was called with.
RECORDER = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'node-07\\nnode-08\\n'; exit; fi
printf '%s\\0' "${0##*/}" "$@" >>"$CALLS"
[[ " $* " == *" train "* ]] || exit 0
rank=0
for end in $ENDS; do echo "$end" >"$LOGS/warmup-11.0-rank-$((rank++)).status"; done
exit "${STATUS:-0}"
"""

# Stands in for Python where only the launcher's own doing counts: a stage at step 4.
AT_STEP_4 = """#!/usr/bin/env bash
if [[ " $* " == *" plan "* ]]; then echo "$@" >>"$CALLS.plan"; exit "${FITS:-0}"; fi
if [[ " $* " == *" status "* ]]; then echo 4; exit 3; fi
"""

APPTAINER = """#!/usr/bin/env bash
echo "in $5: ${*:6}" >&2; shift 5; exec "$@"
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


def executable(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_the_scripts_are_well_formed() -> None:
    subprocess.run(["bash", "-n", *SCRIPTS], check=True)
    if shutil.which("shellcheck") is not None:
        subprocess.run(["shellcheck", "--external-sources", *SCRIPTS], check=True, cwd=ROOT)


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


def test_unknown_stages_and_unset_variables_are_refused(tmp_path: Path) -> None:
    done = run("pretrain", CHECK="1")
    assert done.returncode == 2
    assert "unknown stage 'pretrain', expected convert warmup" in done.stderr
    done = run("router", "--dry-run", PYTHON="true")
    assert (done.returncode, done.stderr) == (
        2,
        "vico.sh: router needs DATA: see docs/slurm.md\n",
    )


def test_the_jobs_that_it_submits(tmp_path: Path) -> None:
    python = executable(tmp_path / "python", AT_STEP_4)
    settings = {"DATA": "/data", "TOKENIZER": "/a b", "EXPORT": "/flash", "TIME": "2:00:00"}
    settings |= {"SBATCH_FLAGS": "--partition=gpu --qos=high", "MODEL": "/hf", "QUESTIONS": "q"}
    done = run("--dry-run", "--", "--lr", "2e-4", PYTHON=python, **settings)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    steps = ["convert", "warmup", "consistency", "router", "export", "evaluate"]
    assert [line[-4:] for line in lines] == [[step, "--", "--lr", "2e-4"] for step in steps]
    nodes = [word for line in lines for word in line if word.startswith("--nodes=")]
    assert nodes == [f"--nodes={number}" for number in (1, 16, 16, 2, 1, 1)]
    assert "--dependency" not in done.stdout.splitlines()[0]
    common = {"sbatch", "--requeue", "--signal=TERM@900", "--time=2:00:00", "--gpus-per-node=8"}
    common |= {"--exclusive", "--partition=gpu", "--qos=high", "--open-mode=append"}
    for before, line in zip(steps, lines[1:], strict=False):
        assert common | {f"--dependency=afterok:JOB_{before}"} <= set(line)


def run_in_job(folder: Path, *words: str, **environment: str) -> tuple[int, str, list[str]]:
    """The script in a job of two nodes: status, what it says, and what it called of SLURM."""
    for name in ("srun", "scontrol"):
        executable(folder / name, RECORDER)
    (folder / "calls").write_text("")
    here = str(folder)
    job = {"SLURM_JOB_ID": "11", "SLURM_JOB_NODELIST": "node-[07-08]", "GPU": "none"}
    job |= {"DATA": here, "TOKENIZER": here, "LOGS": f"{folder}/logs", "CALLS": f"{folder}/calls"}
    done = run(*words, **({"PATH": f"{folder}:{os.environ['PATH']}"} | job | environment))
    return done.returncode, done.stderr, (folder / "calls").read_text().split("\0")[:-1]


@pytest.mark.slow
def test_what_it_starts(tmp_path: Path) -> None:
    here = str(tmp_path)
    flags = ["--lr", "2e-4", "--save", here]
    flags += ["--pretrained-checkpoint", here, "--reference-load", here]
    # All but reading the headers of the checkpoints, which nobody has at this size.
    text = f'#!/usr/bin/env bash\n[[ $* == *"--check files"* ]] || exec {sys.executable} "$@"\n'
    python = executable(tmp_path / "python", text)
    job = {"PYTHON": python}
    status, said, calls = run_in_job(tmp_path, "router", "--", *flags, **job)
    assert status == 0, said
    # Nothing was trained, as after --exit-interval: the job goes back in line.
    assert calls[-3:] == ["scontrol", "requeue", "11"]
    second = calls.index("srun", 1)
    doctor, command = calls[:second], calls[second:-3]
    assert doctor[-3:] == ["doctor", "--gpus", "0"]
    assert {"--nodes=2", "--ntasks=2"} <= set(doctor)
    expected = {"--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--kill-on-bad-exit=1"}
    assert expected | {f"--output={here}/logs/router-11.0-rank-%t.log"} <= set(command)
    # The words that srun would start as one of the ranks.
    shell = command[command.index("bash") :]
    shell[shell.index(python)] = "env"
    task = {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16"}
    shell[shell.index("rank") + 1] = f"{here}/rank"
    separator = shell.index("-m")
    words = subprocess.check_output(shell[:separator], text=True, env=os.environ | task)
    assert {"RANK=9", "LOCAL_RANK=1", "WORLD_SIZE=16"} <= set(words.splitlines())
    assert shell[separator:] == [
        *("-m", "megatron_vico", "train"),
        *("--recipe", "examples/recipes/internvl3_5_241b_a28b/router.yaml"),
        *("--data-path", here, "--tokenizer-model", here),
        *flags,
    ]


@pytest.mark.parametrize(
    ("status", "of_ranks", "ends_with", "says"),
    [
        ("0", "", 0, "ended before its last step"),  # --exit-interval
        ("75", "75 75", 0, "was told to stop"),
        ("143", "75 143", 0, "was told to stop"),
        ("143", "137 143", 0, "starts again"),
        ("1", "137 1", 0, "starts again"),
        ("137", "", 0, "starts again"),  # a node is lost
        ("143", "143 2", 2, "failed with status 2"),
    ],
)
def test_what_it_makes_of_the_end_of_a_stage(
    status: str, of_ranks: str, ends_with: int, says: str, tmp_path: Path
) -> None:
    python = executable(tmp_path / "python", AT_STEP_4)
    settings = {"PYTHON": python, "STATUS": status, "ENDS": of_ranks}
    ended, said, calls = run_in_job(tmp_path, "warmup", **settings)
    assert (ended, says in said) == (ends_with, True), said
    assert (calls[-3:] == ["scontrol", "requeue", "11"]) == (ends_with == 0)


def test_a_recipe_that_does_not_fit_is_not_started(tmp_path: Path) -> None:
    python = executable(tmp_path / "python", AT_STEP_4)
    settings = {"PYTHON": python, "GPU": "h200", "FITS": "2"}
    status, said, calls = run_in_job(tmp_path, "router", "--", "--lr", "2e-4", **settings)
    assert (status, calls[-3:]) == (2, ["doctor", "--gpus", "8"]), said
    assert "train" not in calls
    recipe = "examples/recipes/internvl3_5_241b_a28b/router.yaml"
    words = f"plan --world-size 16 --gpu h200 --quick --recipe {recipe} --lr 2e-4\n"
    assert (tmp_path / "calls.plan").read_text().endswith(words)
    # Asked once; not again after a requeue, nor where PLAN=0.
    for more in ({"SLURM_RESTART_COUNT": "1"}, {"PLAN": "0"}):
        status, said, calls = run_in_job(tmp_path, "router", **settings, **more)
        assert (status, "train" in calls) == (0, True), said


def test_it_does_not_start_again_for_ever_at_the_same_step(tmp_path: Path) -> None:
    python = executable(tmp_path / "python", AT_STEP_4)
    ends = [run_in_job(tmp_path, "warmup", PYTHON=python, STATUS="1") for _ in range(3)]
    assert [status for status, _, _ in ends] == [0, 0, 1]
    assert "starts again from step 4" in ends[0][1]
    assert "scontrol" not in ends[2][2]
    executable(tmp_path / "python", AT_STEP_4.replace("4", "5", 1))  # it got further
    assert run_in_job(tmp_path, "warmup", PYTHON=python, STATUS="1")[0] == 0


def test_the_ranks_and_the_questions_before_them_are_in_the_container(tmp_path: Path) -> None:
    for name, text in (("python", AT_STEP_4), ("apptainer", APPTAINER)):
        executable(tmp_path / name, text)
    settings = {"PYTHON": str(tmp_path / "python"), "MOUNTS": "/data:/data"}
    status, said, calls = run_in_job(tmp_path, "warmup", CONTAINER="te.sif", **settings)
    assert status == 0, said
    assert said.count("in te.sif: ") == 4  # layout, state, files, and the state in the end
    inside = ["rank", "apptainer", "exec", "--nv", "--bind", "/data:/data", "te.sif"]
    assert "\n".join(inside) in "\n".join(calls)
    # pyxis is a part of srun, which answers here that the stage is done.
    status, said, calls = run_in_job(tmp_path, "warmup", CONTAINER="nvcr.io#te", **settings)
    assert (status, calls[-3:]) == (0, ["status", "--recipe", calls[-1]]), said
    assert {"--container-image=nvcr.io#te", "--container-mounts=/data:/data"} <= set(calls)


@pytest.mark.slow
def test_a_missing_file_is_named_once_before_the_ranks_are_started(tmp_path: Path) -> None:
    flags = ("--pretrained-checkpoint", "gone", "--save", str(tmp_path))
    status, said, calls = run_in_job(tmp_path, "router", "--", *flags)
    assert (status, calls) == (2, [])
    assert said.count("ConfigError: --pretrained-checkpoint gone: no such file or folder") == 1


def test_a_stage_that_is_done_is_skipped(tmp_path: Path) -> None:
    """YAML writes the name in quotes."""
    write_step(tmp_path / "2026-11-28", 2)
    flags = ["--lr-warmup-iters", "0", "--train-iters", "2", "--save", "2026-11-28"]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    status, said, calls = run_in_job(
        tmp_path, "router", "--", *flags, SLURM_SUBMIT_DIR=str(tmp_path)
    )
    assert (status, calls) == (0, []), said
    assert "router is done already" in said
