"""Two data-parallel ranks against one process: whole runs of each stage, and with a broken sample.

Ranks stay in step, stop and resume alike, and end together over the budget; one launch runs all.
"""

import contextlib
import dataclasses
import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vico.config.schema import RunConfig
from megatron_vico.data.shards.reader import ShardFolder
from megatron_vico.errors import SampleError
from megatron_vico.parallel.groups import started
from megatron_vico.training.trainer import train
from tests.distributed.launch import on_ranks
from tests.toy_data import break_image
from tests.training_runs import ToyData, read_metrics, toy_config, weights_of

SHARDED = {"pretrain": True, "warmup": False, "consistency": True, "router": False}
"""Whether a stage runs with the distributed optimizer; test_steps.py has the other pairs."""

STEPS = 3
BROKEN_STEPS, SAVED = 7, 4
"""Packs of at most 4 of the 48 samples, 4 a step: an epoch takes three steps or a little more."""

VICTIM = 2
"""A sample with two images."""


@dataclass(frozen=True)
class Runs:
    """Where the runs are, what each rank of each was told at its end, and what was printed."""

    folder: Path
    told: dict[str, tuple[str | None, ...]]
    printed: str
    key: str
    """Of the broken sample."""

    def metrics(self, *names: str) -> list[list[dict[str, Any]]]:
        """The lines of some runs."""
        return [read_metrics(self.folder / name) for name in names]


def stage_config(
    data: ToyData, bases: tuple[Path, Path], stage: str, save: Path, **options: Any
) -> RunConfig:
    reference = bases[stage == "router"]  # there it must not be the policy
    source = {"pretrained_checkpoint": str(bases[0]), "reference_load": str(reference)}
    options |= {} if stage == "pretrain" else source
    return toy_config(
        data, stage, train_iters=STEPS, global_batch_size=4, save=str(save), **options
    )


@pytest.fixture(scope="module")
def runs(
    toy_data: ToyData,
    base_checkpoint: Path,
    other_checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Runs:
    """Every stage in one process and in two; a run that one begins and two end; and with one broken
    sample: one process, two, two that resume from a mended disk, and two without budget."""
    folder, bases = tmp_path_factory.mktemp("runs"), (base_checkpoint, other_checkpoint)
    configs: dict[str, RunConfig] = {}
    for stage, sharded in SHARDED.items():
        train(stage_config(toy_data, bases, stage, folder / f"one_{stage}"))
        configs[f"two_{stage}"] = stage_config(
            toy_data,
            bases,
            stage,
            folder / f"two_{stage}",
            use_distributed_optimizer=sharded,
        )
    moved = stage_config(toy_data, bases, "router", folder / "moved", load=str(folder / "moved"))
    train(dataclasses.replace(moved, training=dataclasses.replace(moved.training, exit_interval=2)))
    configs["moved"] = moved

    broken = ToyData(
        tokenizer=toy_data.tokenizer, shards=shutil.copytree(toy_data.shards, folder / "shards")
    )
    key = break_image(broken.shards, VICTIM)

    def config(name: str, data: ToyData = broken, **options: Any) -> RunConfig:
        fields = {
            "train_iters": BROKEN_STEPS,
            "global_batch_size": 4,
            "save_interval": SAVED,
            "save": str(folder / name),
        }
        return toy_config(data, "pretrain", **(fields | options))

    train(config("one"))
    train(config("whole", toy_data))
    resumed = {"load": str(folder / "resumed")}
    configs |= {
        "two": config("two", num_workers=1),
        "stopped": config("resumed", exit_interval=SAVED),
        "resumed": config("resumed", toy_data, num_workers=1, **resumed),
        "forgetful": config("forgetful", ckpt_step=SAVED, max_skipped_share=0.0, **resumed),
        "no budget": config("no_budget", max_skipped_share=0.0),
    }
    ranks = on_ranks(end_of_each, list(configs.values()), num_ranks=2)
    told = dict(zip(configs, zip(*(rank.told for rank in ranks), strict=True), strict=True))
    return Runs(folder=folder, told=told, printed="".join(rank.printed for rank in ranks), key=key)


@dataclass(frozen=True)
class Ended:
    """What one rank was told at the end of each run, and what it printed."""

    told: list[str | None]
    printed: str


def end_of_each(configs: Sequence[RunConfig]) -> Ended:
    """Train every configuration with one set of process groups; called by every rank."""
    told: list[str | None] = []
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        started(configs[0].parallel, seed=1, timeout_minutes=2),
    ):
        for cfg in configs:
            try:
                train(cfg)
                told.append(None)
            except SampleError as error:
                told.append(str(error))
    return Ended(told, printed.getvalue())


@pytest.mark.parametrize("stage", SHARDED)
def test_two_ranks_equal_one_process(
    stage: str, runs: Runs, toy_data: ToyData, base_checkpoint: Path
) -> None:
    """Measured over three steps: losses 8e-8, gradient norms 3e-6, weights 5e-6 of the norm of each
    tensor."""
    one, two = runs.metrics(f"one_{stage}", f"two_{stage}")
    assert len(one) == len(two) == STEPS
    for found, expected in zip(two, one, strict=True):
        assert found["samples"] == expected["samples"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        if stage == "router":
            threshold = expected["router_threshold"]
            assert found["router_threshold"] == pytest.approx(threshold, rel=1e-5)
    cfg = stage_config(toy_data, (base_checkpoint,) * 2, stage, runs.folder)
    two_modules, one_modules = (
        weights_of(cfg, runs.folder / f"{name}_{stage}") for name in ("two", "one")
    )
    for module, expected_module in zip(two_modules, one_modules, strict=True):
        for (name, param), expected_param in zip(
            module.named_parameters(), expected_module.parameters(), strict=True
        ):
            found, truth = (_moved(name, each.detach()) for each in (param, expected_param))
            error = float((found - truth).norm() / truth.norm().clamp_min(1e-6))
            assert error < 1e-5, f"{name}: {error}"


def _moved(name: str, tensor: Tensor) -> Tensor:
    """Without the bias of attention's keys: softmax does not see it, its gradient is rounding alone
    (2e-7 after three steps), and Adam makes steps of it."""
    if not name.endswith("in_proj_bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])


def test_a_run_goes_on_with_another_number_of_ranks(runs: Runs) -> None:
    """One process begins, two end. Measured: losses 7e-8, gradient norms 0."""
    for found, expected in zip(*runs.metrics("moved", "one_router"), strict=True):
        for name in ("loss", "grad_norm", "router_threshold"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5)


def test_two_ranks_stay_in_step_though_a_sample_of_one_is_broken(
    runs: Runs, toy_data: ToyData
) -> None:
    """Measured: losses 1.3e-7."""
    one, two, whole = runs.metrics("one", "two", "whole")
    assert runs.told["two"] == (None, None)
    assert len(one) == len(two) == BROKEN_STEPS
    for found, expected, unbroken in zip(two, one, whole, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["samples"] == expected["samples"] == unbroken["samples"]
        assert found["skipped"] == expected["skipped"]
    assert sum(step["skipped"] for step in two) == 1, "a sample that comes again counts once"
    num_tiles = int(ShardFolder.open(toy_data.shards).num_tiles[VICTIM])
    left_out = [
        unbroken["tiles"] - found["tiles"] for found, unbroken in zip(two, whole, strict=True)
    ]
    assert sum(left_out) >= 2 * num_tiles
    assert set(left_out) == {0, num_tiles}


def test_the_rank_that_met_it_says_so_once_and_the_log_line_counts_it(runs: Runs) -> None:
    lines = [line for line in runs.printed.splitlines() if line.startswith("skipped sample")]
    assert len(lines) == 3  # two, stopped, no budget
    assert all(line.startswith(f"skipped sample {runs.key!r}: broken image: ") for line in lines)
    assert "| skipped samples: 1 |" in runs.printed


def test_a_resumed_run_leaves_it_out_though_it_has_become_readable(runs: Runs) -> None:
    """Measured: losses 0."""
    resumed, two, whole = runs.metrics("resumed", "two", "whole")
    for found, expected in zip(resumed, two, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert found["skipped"] == expected["skipped"]
        assert found["tiles"] == expected["tiles"]
    after = zip(resumed[SAVED:], whole[SAVED:], strict=True)
    assert any(found["tiles"] < unbroken["tiles"] for found, unbroken in after)


def test_without_a_budget_both_ranks_stop_at_the_same_step_with_a_table(runs: Runs) -> None:
    for name in ("no budget", "forgetful"):
        first, second = runs.told[name]
        assert first == second
        assert first is not None
        assert first.startswith("1 broken samples among ")
        assert first.splitlines()[-1] == f"{1:8}  {'broken image':16}  {runs.key!r}"
    no_budget, forgetful = runs.metrics("no_budget", "forgetful")
    assert [step["skipped"] for step in no_budget] == [0] * (len(no_budget) - 1) + [1]
    assert len(forgetful) == 1  # counted before the checkpoint
