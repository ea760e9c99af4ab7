"""A broken sample on one of two ranks: both stay in step, stop and resume alike, and end together
over the budget."""

import json
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_vico.config.schema import RunConfig
from megatron_vico.data.shards.reader import ShardFolder
from megatron_vico.training.trainer import train
from tests.distributed.launch import launch
from tests.toy_data import break_image
from tests.training_runs import ToyData, read_metrics, toy_config

STEPS, SAVED = 7, 4
"""Packs of at most 4 of the 48 samples, 4 a step: an epoch takes three steps or a little more."""

VICTIM = 2
"""A sample with two images."""


@dataclass(frozen=True)
class Runs:
    """Where the runs are, what each rank of each was told at its end, and what was printed."""

    folder: Path
    told: dict[str, list[str | None]]
    printed: str
    key: str


@pytest.fixture(scope="module")
def runs(toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """With one broken sample: one process, two, the same resumed by two from a mended disk; and one
    without budget."""
    folder = tmp_path_factory.mktemp("skipped")
    broken = ToyData(
        tokenizer=toy_data.tokenizer, shards=shutil.copytree(toy_data.shards, folder / "shards")
    )
    key = break_image(broken.shards, VICTIM)

    def config(name: str, data: ToyData = broken, **options: Any) -> RunConfig:
        fields = {
            "train_iters": STEPS,
            "global_batch_size": 4,
            "save_interval": SAVED,
            "save": str(folder / name),
        }
        return toy_config(data, "pretrain", **(fields | options))

    train(config("one"))
    train(config("whole", toy_data))
    configs = {
        "two": config("two", num_workers=1),
        "stopped": config("resumed", exit_interval=SAVED),
        "resumed": config("resumed", toy_data, load=str(folder / "resumed"), num_workers=1),
        "forgetful": config(
            "forgetful",
            broken,
            load=str(folder / "resumed"),
            ckpt_step=SAVED,
            max_skipped_share=0.0,
        ),
        "no budget": config("no_budget", max_skipped_share=0.0),
    }
    (folder / "configs.pkl").write_bytes(pickle.dumps(list(configs.values())))
    printed = launch("run_skipped.py", folder, num_processes=2)
    told = dict(zip(configs, json.loads((folder / "told.json").read_text()), strict=True))
    return Runs(folder=folder, told=told, printed=printed, key=key)


def test_two_ranks_stay_in_step_with_one_process(runs: Runs, toy_data: ToyData) -> None:
    """Measured: losses 1.3e-7."""
    one, two, whole = (read_metrics(runs.folder / name) for name in ("one", "two", "whole"))
    assert runs.told["two"] == [None, None]
    assert len(one) == len(two) == STEPS
    for mine, theirs, before in zip(two, one, whole, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["samples"] == theirs["samples"] == before["samples"]
        assert mine["skipped"] == theirs["skipped"]
    assert sum(step["skipped"] for step in two) == 1, "a sample that comes again counts once"
    num_tiles = int(ShardFolder.open(toy_data.shards).num_tiles[VICTIM])
    visits = [before["tiles"] - mine["tiles"] for mine, before in zip(two, whole, strict=True)]
    assert sum(visits) >= 2 * num_tiles
    assert set(visits) == {0, num_tiles}


def test_the_rank_that_met_it_says_so_once_and_the_log_line_counts_it(runs: Runs) -> None:
    lines = [line for line in runs.printed.splitlines() if line.startswith("skipped sample")]
    assert len(lines) == 3  # two, stopped, no budget
    assert all(line.startswith(f"skipped sample {runs.key!r}: broken image: ") for line in lines)
    assert "| skipped samples: 1 |" in runs.printed


def test_a_resumed_run_leaves_it_out_though_it_has_become_readable(runs: Runs) -> None:
    """Measured: losses 0."""
    resumed, two, whole = (read_metrics(runs.folder / name) for name in ("resumed", "two", "whole"))
    for mine, theirs in zip(resumed, two, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert mine["skipped"] == theirs["skipped"]
        assert mine["tiles"] == theirs["tiles"]
    assert any(
        mine["tiles"] < step["tiles"]
        for mine, step in zip(resumed[SAVED:], whole[SAVED:], strict=True)
    )


def test_without_a_budget_both_ranks_stop_at_the_same_step_with_a_table(runs: Runs) -> None:
    for name in ("no budget", "forgetful"):
        first, second = runs.told[name]
        assert first == second
        assert first is not None
        assert first.startswith("1 broken samples among ")
        assert first.splitlines()[-1] == f"{1:8}  {'broken image':16}  {runs.key!r}"
    steps = read_metrics(runs.folder / "no_budget")
    assert [step["skipped"] for step in steps] == [0] * (len(steps) - 1) + [1]
    assert len(read_metrics(runs.folder / "forgetful")) == 1  # counted before the checkpoint
