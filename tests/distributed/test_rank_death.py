"""A rank that dies ends the others, with the cause; a rank that is told to stop ends all of them
with a checkpoint."""

from pathlib import Path

import pytest

from megatron_vico.checkpoint import training_checkpoint
from megatron_vico.cli.train import STOPPED
from tests.distributed import programs
from tests.training_runs import ToyData

# A collective waits 30 minutes (--distributed-timeout-minutes): a rank that hangs is not over in
# time.
LIMIT_S = 120


def launch(how: str, data: ToyData, save: Path) -> str:
    """Two ranks of a pretraining run, of which one is treated as `how` says at its second step;
    what all say until torchrun ends with an error."""
    words = f"""
        -m torch.distributed.run --standalone --nproc-per-node 2
        tests/distributed/run_failing_rank.py {how}
        --stage pretrain --data-path {data.shards} --tokenizer-model {data.tokenizer} --save {save}
        --train-iters 50 --seq-length 600 --max-tiles-per-pack 40 --max-samples-per-pack 4
        --max-dynamic-patch 4 --global-batch-size 2 --num-workers 1
    """.split()
    log = save.with_suffix(".log")
    torchrun = programs.start(words, log=log)
    torchrun.join(LIMIT_S)
    assert torchrun.exitcode not in (None, 0), log.read_text()[-6000:]
    return log.read_text()


@pytest.mark.parametrize(
    ("how", "causes"),
    [
        ("raise", ("rank 1: ArithmeticError: the cause of it all", "exitcode  : 1 ")),
        ("kill", ("exitcode  : -9 ", "Signal 9 (SIGKILL)")),
    ],
)
def test_a_rank_that_dies_ends_the_other_with_the_cause(
    how: str, causes: tuple[str, ...], toy_data: ToyData, tmp_path: Path
) -> None:
    told = launch(how, toy_data, tmp_path)
    for text in causes:
        assert text in told, told[-6000:]
    # torchrun's summary names the rank that died, not the one that was waiting for it.
    root_cause = told.split("Root Cause (first observed failure):")[1]
    assert "rank      : 1 (local_rank: 1)" in root_cause
    assert "rank      : 0" not in root_cause
    # The one that waited says so in a line, and the cause stays in sight.
    assert len([line for line in told.splitlines() if line.startswith("rank 0: ")]) <= 1, told[
        -6000:
    ]
    assert training_checkpoint.latest_iteration(tmp_path) is None
    if how == "raise":
        assert "ArithmeticError: the cause of it all" in root_cause


def test_ranks_that_fail_together_save_first(toy_data: ToyData, tmp_path: Path) -> None:
    told = launch("raise-all", toy_data, tmp_path)
    assert "ArithmeticError: the cause of it all" in told
    assert "iter_0000001 is saved before the run ends with an error" in told
    assert training_checkpoint.latest_iteration(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.glob("*.*")) == [
        "config.yaml",
        "latest_checkpointed_iteration.txt",
        "metrics.jsonl",
    ]


def test_a_rank_that_is_told_to_stop_ends_all_with_a_checkpoint(
    toy_data: ToyData, tmp_path: Path
) -> None:
    told = launch("stop", toy_data, tmp_path)
    # So that a chain of commands does not go on with the next stage.
    assert f"exitcode  : {STOPPED} " in told, told[-6000:]
    # Told while it reads the second step's packs: no rank begins that step.
    assert training_checkpoint.latest_iteration(tmp_path) == 1
