"""Figures of a step: what is written, what is dropped on resume, and when a run is stopped."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from megatron_vico.config.schema import CheckpointOptions, RunConfig, TrainingOptions
from megatron_vico.data.load.error_budget import ErrorBudget
from megatron_vico.files import read_json_lines
from megatron_vico.training.logger import LINE, MetricsLogger
from megatron_vico.training.metrics import (
    MARGIN_BINS,
    Measured,
    RouterSums,
    StepFigures,
    StepSums,
    ValidationFigures,
    area_under_curve,
    margin_counts,
)
from megatron_vico.training.step_clock import StepClock


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
    save: Path | None,
    *,
    resume_at: int = 0,
    consumed_samples: int = 0,
    is_main: bool = True,
    log_interval: int = 1,
    wandb_project: str | None = None,
) -> MetricsLogger:
    cfg = RunConfig(
        training=TrainingOptions(train_iters=10, log_interval=log_interval),
        checkpoint=CheckpointOptions(
            save=None if save is None else str(save), wandb_project=wandb_project
        ),
    )
    budget = ErrorBudget(max_share=0.0, seen=32 * resume_at)
    return MetricsLogger(cfg, resume_at=resume_at, budget=budget, is_main=is_main)


def test_reduce_counts_fractions(single_process_groups: None) -> None:
    names = [field.name for field in dataclasses.fields(RouterSums)]
    values = map(torch.tensor, (8.0, 5.0, 4.0, 6.0, 16.0))
    margins = margin_counts(torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0, 1, 1]))
    window = torch.tensor([1.5, 1.0, 1.2, 9.0])
    router = RouterSums(**dict(zip(names, (*values, margins, window), strict=True)))
    sums = StepSums(
        loss=torch.tensor(2.0),
        samples=8,
        tiles=40,
        compressed_tiles=10,
        reference_tokens=1000,
        policy_tokens=700,
        response_tokens=90,
        kl_by_share=torch.tensor([0.0, 0.5, 0.0, 0.0, 1.5]),
        weight_by_share=torch.tensor([0.5, 0.25, 0.0, 0.0, 0.25]),
        router=router,
    )
    measured = Measured(
        flops=8e12,
        room_tokens=1250,
        memory_bytes=(3e9, 4e9),
        phases_s={"encode": 0.5, "optimizer": 0.25},
        peak_tflops=40.0,
    )
    figures = StepFigures.reduce(
        sums, measured, iteration=3, grad_norm=0.1, learning_rate=1e-4, step_time_s=2.0
    )
    assert (figures.tokens_per_s, figures.tokens_per_s_per_gpu, figures.fill) == (500, 500, 0.8)
    assert (figures.tflops_per_gpu, figures.mfu, figures.work_imbalance) == (4.0, 0.1, 1.0)
    assert (figures.memory_allocated_gb, figures.memory_reserved_gb) == (3.0, 4.0)
    assert (figures.encode_s, figures.reference_s, figures.optimizer_s) == (0.5, None, 0.25)
    assert (figures.kl_compressed_0, figures.kl_compressed_25) == (0.0, 2.0)
    assert (figures.kl_compressed_50, figures.kl_compressed_100) == (None, 6.0)
    assert figures.router_auc == 0.5
    assert (figures.router_ratio_p10, figures.router_ratio_p90) == (1.0, 9.0)
    assert figures.compressed_tiles == 0.25
    assert figures.visual_token_reduction == pytest.approx(0.3)
    assert figures.router_accuracy == 0.75
    assert figures.router_labelled_compress == 0.625
    assert figures.router_mean_log_ratio == 2.0
    assert figures.router_threshold == 1.5


def test_a_resumed_run_drops_the_lines_it_writes_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = logger_for(tmp_path)
    for iteration in range(1, 6):
        first.log(figures_of(iteration))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 6, "lo')  # a run that was killed while it wrote
    text = (tmp_path / "metrics.jsonl").read_bytes()
    # A machine that was switched off left a block of zero bytes where a line was.
    (tmp_path / "metrics.jsonl").write_bytes(text.replace(b"\n", b"\n\0\0\0\n", 1))
    second = logger_for(tmp_path, resume_at=3)
    assert "metrics.jsonl: line 2, 7 is damaged and is dropped" in capsys.readouterr().out
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
    assert "TFLOP/s/GPU" not in line  # nobody measured it
    logger.log(dataclasses.replace(figures_of(3), tflops_per_gpu=250.0, encode_s=2.0))
    logger.log(dataclasses.replace(figures_of(4), tflops_per_gpu=350.0, mfu=0.3))
    line = capsys.readouterr().out
    for words in (
        "elapsed time per iteration (ms): 100.0 | throughput per GPU (TFLOP/s/GPU): 300.0 | lea",
        "mfu: 30.0%",
        "encode s: 2.000",
    ):
        assert words in line


def test_every_figure_has_its_line_in_the_documentation() -> None:
    names = {field.name for field in dataclasses.fields(StepFigures)}
    assert LINE.keys() <= names
    page = (Path(__file__).parents[3] / "docs" / "figures.md").read_text()
    page = re.sub(r"`(\w+)_(0|p10)`((, `_\w+`)+)", _written_out, page)
    assert names <= set(re.findall(r"`(\w+)`", page))


def _written_out(found: re.Match[str]) -> str:
    ends = [f"_{found[2]}", *re.findall(r"`(_\w+)`", found[3])]
    return ", ".join(f"`{found[1]}{end}`" for end in ends)


def test_the_area_under_the_curve_is_that_of_all_pairs() -> None:
    """Against a comparison of all pairs. Measured: within 0.0013, and within 0.017 where margins
    beyond 20 share a bin."""
    generator = torch.Generator().manual_seed(0)
    for spread in (1e-3, 1.0, 30.0):
        label = torch.randint(2, (4000,), generator=generator)
        margin = spread * (torch.randn(4000, generator=generator) - 0.8 * label)
        pairs = margin[label == 0][:, None] - margin[label == 1][None]
        expected = float((pairs > 0).double().mean() + (pairs == 0).double().mean() / 2)
        found = area_under_curve(margin_counts(margin, label))
        assert found == pytest.approx(expected, abs=0.02)
    assert area_under_curve(torch.zeros(2 * MARGIN_BINS)) is None


def test_phases_are_those_of_the_step_before() -> None:
    clock = StepClock(torch.device("cpu"))
    clock.begin("policy")
    clock.drop_step()  # of a validation set
    for phase in ("encode", "reference", "encode", "other"):
        clock.begin(phase)
    assert clock.end_step() == {}
    clock.begin("optimizer")
    first, second = clock.end_step(), clock.end_step()
    assert {name for name, time_s in first.items() if time_s} == {"encode", "reference"}
    assert {name for name, time_s in second.items() if time_s} == {"optimizer"}


def test_validation_has_lines_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logger_for(tmp_path)
    logger.log(figures_of(1))
    logger.log(
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
        "validation at step 1: valid loss: 0.25 | valid loss all compressed: 0.5 |"
        " valid samples: 7 | valid time s: 2" in capsys.readouterr().out
    )
    resumed = logger_for(tmp_path, resume_at=1, consumed_samples=32)
    resumed.log(figures_of(2))
    resumed.close()
    # Those of validation are not consumed.
    assert "consumed samples:           64" in capsys.readouterr().out


def test_a_full_disk_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of metrics.jsonl, at its second line, and of TensorBoard's folder, from the beginning."""
    (tmp_path / "tensorboard").write_text("in the way")
    logger = logger_for(tmp_path)
    logger.log(figures_of(1))
    lines = tmp_path / "metrics.jsonl"
    lines.rename(tmp_path / "kept")
    lines.symlink_to("/dev/full")
    logger.log(figures_of(2))
    logger.log(figures_of(3))
    (tmp_path / "kept").replace(lines)
    with lines.open("a") as file:
        file.write('{"iteration": 2, "lo')  # what fitted
    logger.log(figures_of(4))
    logger.close()
    told = capsys.readouterr().out
    assert told.count("warning: metrics.jsonl cannot be written: [Errno 28] No space left") == 1
    assert told.count("warning: TensorBoard cannot be written: ") == 1
    assert "iteration        3/      10" in told
    rows, damaged = read_json_lines(lines)
    assert ([row["iteration"] for row in rows], damaged) == ([1, 4], [2])


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logger_for(tmp_path, is_main=False)
    logger.log(figures_of(1))
    logger.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_wandb_gets_the_same_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, two sittings of one run."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for iteration in (1, 2):
        logger = logger_for(tmp_path / "run", resume_at=iteration - 1, wandb_project="vico")
        logger.log(figures_of(iteration))
        logger.close()
    logs = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len({path.name for path in logs}) == 1  # wandb sync adds the second to the first
    names = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    for name in names.keys() - {"iteration"}:
        assert name.encode() in logs[0].read_bytes(), name
