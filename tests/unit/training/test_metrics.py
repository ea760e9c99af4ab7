"""Figures of a step: what is written, what is dropped on resume, and when a run is stopped."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megatron_vico.config.schema import CheckpointOptions, RunConfig, TrainingOptions
from megatron_vico.training.metrics import (
    MetricsLogger,
    RouterSums,
    StepFigures,
    StepSums,
    ValidationFigures,
    check_finite,
)


def figures_of(iteration: int, loss: float = 1.0) -> StepFigures:
    return StepFigures(
        iteration=iteration,
        loss=loss,
        grad_norm=0.5,
        learning_rate=1e-3,
        step_time_s=0.1,
        samples=32,
        tiles=128,
        compressed_tiles=0.5,
        visual_token_reduction=0.3,
        policy_tokens=1000,
        response_tokens=200,
    )


def logger_for(
    save: Path | None, *, resume_at: int = 0, is_main: bool = True, log_interval: int = 1
) -> MetricsLogger:
    cfg = RunConfig(
        training=TrainingOptions(train_iters=10, log_interval=log_interval),
        checkpoint=CheckpointOptions(save=None if save is None else str(save)),
    )
    return MetricsLogger(cfg, resume_at=resume_at, is_main=is_main)


def test_reduce_counts_fractions(single_process_groups: None) -> None:
    names = [field.name for field in dataclasses.fields(RouterSums)]
    values = map(torch.tensor, (8.0, 5.0, 4.0, 6.0, 16.0, 1.5))
    router = RouterSums(**dict(zip(names, values, strict=True)))
    sums = StepSums(
        loss=torch.tensor(2.0),
        samples=8,
        tiles=40,
        compressed_tiles=10,
        reference_tokens=1000,
        policy_tokens=700,
        response_tokens=90,
        router=router,
    )
    figures = StepFigures.reduce(
        sums, iteration=3, grad_norm=0.1, learning_rate=1e-4, step_time_s=2.0
    )
    assert figures.compressed_tiles == 0.25
    assert figures.visual_token_reduction == pytest.approx(0.3)
    assert figures.router_accuracy == 0.75
    assert figures.router_labelled_compress == 0.625
    assert figures.router_mean_log_ratio == 2.0
    assert figures.router_threshold == 1.5


def test_a_resumed_run_drops_the_lines_it_writes_again(tmp_path: Path) -> None:
    first = logger_for(tmp_path)
    for iteration in range(1, 6):
        first.log(figures_of(iteration))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 6, "lo')  # a run that was killed while it wrote
    second = logger_for(tmp_path, resume_at=3)
    second.log(figures_of(4, loss=7.0))
    second.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["loss"] == 7.0
    assert list((tmp_path / "tensorboard").iterdir())


def test_the_log_line_is_megatrons(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logger_for(None, log_interval=2)
    logger.log(figures_of(1, loss=1.0))
    assert capsys.readouterr().out == ""
    logger.log(figures_of(2, loss=3.0))
    line = capsys.readouterr().out
    assert "iteration        2/      10 | consumed samples:           64 |" in line
    assert "loss: 2.000000E+00" in line  # the mean since the last line
    assert "compressed tiles: 50.0%" in line


def test_validation_has_lines_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logger_for(tmp_path)
    logger.log(figures_of(1))
    logger.log_validation(
        ValidationFigures(iteration=1, loss=0.25, samples=7, time_s=2.0, loss_all_compressed=0.5)
    )
    logger.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[1] == {
        "iteration": 1,
        "valid_loss": 0.25,
        "valid_samples": 7,
        "valid_time_s": 2.0,
        "valid_loss_all_compressed": 0.5,
    }
    assert (
        "validation at step 1: loss: 0.25 | loss all compressed: 0.5 | samples: 7 | time s: 2"
        in capsys.readouterr().out
    )
    resumed = logger_for(tmp_path, resume_at=1)
    resumed.log(figures_of(2))
    resumed.close()
    # Those of validation are not consumed.
    assert "consumed samples:           64" in capsys.readouterr().out


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logger_for(tmp_path, is_main=False)
    logger.log(figures_of(1))
    logger.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("broken", [{"loss": float("nan")}, {"grad_norm": float("inf")}])
def test_a_loss_that_is_no_number_stops_the_run(broken: dict[str, float]) -> None:
    check_finite(figures_of(1))
    with pytest.raises(FloatingPointError, match="iteration 1"):
        check_finite(dataclasses.replace(figures_of(1), **broken))
