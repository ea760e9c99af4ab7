"""Two data-parallel ranks against one process: whole runs of each stage, to the saved weights."""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest

from megatron_vico.config.schema import RunConfig
from megatron_vico.training.trainer import train
from tests.distributed.launch import launch
from tests.training_runs import ToyData, read_metrics, toy_config, weights_of

SHARDED = {"pretrain": True, "warmup": False, "consistency": True, "router": False}
"""Whether a stage runs with the distributed optimizer; test_steps.py has the other pairs."""

STEPS = 3


def config_of(data: ToyData, base: Path, stage: str, save: Path, **options: Any) -> RunConfig:
    source = (
        {}
        if stage == "pretrain"
        else {"pretrained_checkpoint": str(base), "reference_load": str(base)}
    )
    return toy_config(
        data, stage, **source, train_iters=STEPS, global_batch_size=4, save=str(save), **options
    )


@pytest.fixture(scope="module")
def runs(
    toy_data: ToyData, base_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Every stage in one process and in two, and a run that one begins and two end."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in SHARDED:
        train(config_of(toy_data, base_checkpoint, stage, folder / f"one_{stage}"))
    two = [
        config_of(
            toy_data,
            base_checkpoint,
            stage,
            folder / f"two_{stage}",
            use_distributed_optimizer=sharded,
        )
        for stage, sharded in SHARDED.items()
    ]
    moved = config_of(
        toy_data, base_checkpoint, "router", folder / "moved", load=str(folder / "moved")
    )
    train(dataclasses.replace(moved, training=dataclasses.replace(moved.training, exit_interval=2)))
    (folder / "configs.pkl").write_bytes(pickle.dumps([*two, moved]))
    launch("run_stages.py", folder / "configs.pkl", num_processes=2)
    return folder


@pytest.mark.parametrize("stage", SHARDED)
def test_two_ranks_equal_one_process(
    stage: str, runs: Path, toy_data: ToyData, base_checkpoint: Path
) -> None:
    """Measured over three steps: losses 8e-8, gradient norms 3e-6, weights 5e-6 of the norm of each
    tensor."""
    one, two = read_metrics(runs / f"one_{stage}"), read_metrics(runs / f"two_{stage}")
    assert len(one) == len(two) == STEPS
    for found, expected in zip(two, one, strict=True):
        assert found["samples"] == expected["samples"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        if stage == "router":
            assert found["router_threshold"] == pytest.approx(
                expected["router_threshold"], rel=1e-5
            )
    cfg = config_of(toy_data, base_checkpoint, stage, runs)
    pairs = zip(
        weights_of(cfg, runs / f"two_{stage}"),
        weights_of(cfg, runs / f"one_{stage}"),
        strict=True,
    )
    for mine, theirs in pairs:
        for (name, found), expected in zip(
            mine.named_parameters(), theirs.parameters(), strict=True
        ):
            error = float(
                (found - expected).detach().norm() / expected.detach().norm().clamp_min(1e-6)
            )
            assert error < 1e-5, f"{name}: {error}"


def test_a_run_goes_on_with_another_number_of_ranks(runs: Path) -> None:
    """One process begins, two end. Measured: losses 7e-8, gradient norms 0."""
    for found, expected in zip(
        read_metrics(runs / "moved"), read_metrics(runs / "one_router"), strict=True
    ):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert found["router_threshold"] == pytest.approx(expected["router_threshold"], rel=1e-5)
