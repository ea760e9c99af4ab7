"""How runs end other than by their last step: signals, bad steps, nothing to learn."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vico.checkpoint.run_folder import latest_iteration
from megatron_vico.config.schema import RunConfig, TrainingOptions
from megatron_vico.data.encode.sample_encoder import SampleEncoder
from megatron_vico.errors import ConfigError, TrainingError, WorkerError
from megatron_vico.files import read_json_lines
from megatron_vico.training import trainer, validation
from megatron_vico.training.bad_steps import FEWEST, MOST_BAD, StepWatch, refuse_learning_nothing
from megatron_vico.training.setup import Run
from megatron_vico.training.trainer import train
from tests.toy_data import write_conversations
from tests.training_runs import ToyData, make_toy_shards, read_metrics, untimed

MakeConfig = Callable[..., RunConfig]
PATHS = {
    "set_up": (trainer, "set_up"),
    "step": (trainer, "compute_gradients"),
    "save": (trainer, "_save"),
    "validation": (validation, "log_skipped"),
}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)}
    before[signal.SIGINT] = signal.getsignal(signal.SIGINT)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def told_during(monkeypatch: pytest.MonkeyPatch, where: str, number: int) -> list[str]:
    """The process gets a signal when it first comes to `where`; returns each time it was there."""
    module, name = PATHS[where]
    function, times = getattr(module, name), []

    def with_signal(*args: Any, **options: Any) -> Any:
        times.append(where)
        if len(times) == 1:
            os.kill(os.getpid(), number)
        return function(*args, **options)

    monkeypatch.setattr(module, name, with_signal)
    return times


@pytest.mark.parametrize(
    ("where", "saved", "number", "outcome"),
    [
        ("set_up", None, signal.SIGTERM, "stopped"),
        ("step", 1, signal.SIGTERM, "stopped"),
        ("save", 2, signal.SIGTERM, "stopped"),
        ("validation", 2, signal.SIGTERM, "stopped"),
        ("step", 1, signal.SIGUSR1, "stopped"),
        ("step", 1, signal.SIGINT, "interrupted"),
    ],
)
def test_a_signal_ends_a_run_within_a_batch_with_a_checkpoint(
    where: str,
    saved: int | None,
    number: int,
    outcome: str,
    toy_data: ToyData,
    stage_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = told_during(monkeypatch, where, number)
    options = {"valid_data_path": (str(toy_data.shards),), "eval_interval": 2, "save_interval": 2}
    cfg = stage_config("pretrain", train_iters=9, save=str(tmp_path), **options)
    assert train(cfg) == outcome
    assert latest_iteration(tmp_path) == saved
    assert len(times) == 1
    if saved is not None:
        rows = read_metrics(tmp_path)
        assert [row["iteration"] for row in rows] == list(range(1, saved + 1))


@pytest.mark.slow
def test_a_batch_that_was_read_but_not_used_comes_again(
    stage_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on as one that was never told to stop."""
    options = {"train_iters": 3, "num_workers": 1}
    train(stage_config("pretrain", save=str(tmp_path / "whole"), **options))
    told_during(monkeypatch, "step", signal.SIGTERM)
    paths = dict.fromkeys(("save", "load"), str(tmp_path / "cut"))
    for outcome in ("stopped", "ended"):
        assert train(stage_config("pretrain", **options, **paths)) == outcome
    found, expected = (read_metrics(tmp_path / name) for name in ("cut", "whole"))
    assert [untimed(row) for row in found] == [untimed(row) for row in expected]


@pytest.mark.slow
@pytest.mark.parametrize("told", [False, True])
def test_workers_that_hang(
    told: bool, stage_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends with an error after its time, or when it is told to stop."""
    monkeypatch.setattr(SampleEncoder, "encode", lambda *_, **__: time.sleep(600))
    limit_s = 600.0 if told else 1.0
    cfg = stage_config(
        "pretrain", train_iters=2, num_workers=1, data_timeout_s=limit_s, save=str(tmp_path)
    )
    if told:
        monkeypatch.setattr(trainer, "open_validation", lambda _: os.kill(os.getpid(), 15))
        assert train(cfg) == "stopped"
    else:
        with pytest.raises(WorkerError, match=r"have given nothing for 1 s \(--data-timeout-s\)"):
            train(cfg)


def poisoned(monkeypatch: pytest.MonkeyPatch, *steps: int, value: float = float("nan")) -> None:
    """Gradients of the calls with these numbers, from 1, are made bad."""
    function, calls = trainer.compute_gradients, []

    def compute(run: Run, batch: Any) -> Any:
        sums = function(run, batch)
        calls.append(batch)
        if len(calls) in steps:
            for ddp in (*run.policy.language_ddp, run.policy.encoder_ddp):
                for param in ddp.parameters():
                    if param.requires_grad:
                        param.main_grad.mul_(value)
        return sums

    monkeypatch.setattr(trainer, "compute_gradients", compute)


@pytest.mark.slow
@pytest.mark.parametrize("save_interval", [1, None])
def test_a_bad_step_stops_the_run_before_its_weights_change(
    save_interval: int | None,
    stage_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was reached is saved, and the run goes on from it as if nothing had happened."""
    options = {"train_iters": 4, "save_interval": save_interval}
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    with monkeypatch.context() as patch:
        poisoned(patch, 3)
        with pytest.raises(TrainingError, match=r"iteration 3: .*, gradient norm nan; its samples"):
            train(stage_config("pretrain", save=str(cut), **options))
    assert latest_iteration(cut) == 2
    assert len(read_metrics(cut)) == 2
    (row,), _ = read_json_lines(cut / "bad_steps.jsonl")
    assert (row["iteration"], row["action"]) == (3, "stop")
    assert len(row["keys"]) == 8
    assert row["keys"][0].startswith("conversations-")
    train(stage_config("pretrain", save=str(cut), load=str(cut), **options))
    train(stage_config("pretrain", save=str(whole), **options))
    found, expected = (list(map(untimed, read_metrics(each))) for each in (cut, whole))
    assert found == expected


def test_a_bad_step_is_left_out(
    stage_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = []
    poisoned(monkeypatch, 2, value=float("inf"))
    original = trainer.update_weights

    def update(run: Run) -> float:
        before = run.policy.encoder.connector_4x.linear_1.weight.clone()
        norm = original(run)
        after = run.policy.encoder.connector_4x.linear_1.weight
        updates.append(not torch.equal(before, after))
        return norm

    monkeypatch.setattr(trainer, "update_weights", update)
    cfg = stage_config("pretrain", train_iters=4, save=str(tmp_path), on_bad_step="skip")
    assert train(cfg) == "ended"
    assert updates == [True, False, True, True]
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [1, 3, 4]


@pytest.mark.slow
def test_a_bad_step_takes_the_run_back_and_its_data_is_left_out(
    stage_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, 4)
    options = {"on_bad_step": "rollback", "save_interval": 2, "train_iters": 4}
    assert train(stage_config("pretrain", save=str(tmp_path / "back"), **options)) == "ended"
    rows = read_metrics(tmp_path / "back")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    monkeypatch.undo()
    train(stage_config("pretrain", save=str(tmp_path / "plain"), train_iters=4))
    plain = read_metrics(tmp_path / "plain")
    assert [untimed(row) for row in rows[:2]] == [untimed(row) for row in plain[:2]]
    # Steps 3 and 4 took the weights and rate of step 2 on, with the batches of calls 5 and 6.
    assert rows[2]["learning_rate"] == plain[2]["learning_rate"]
    assert rows[2]["loss"] != plain[2]["loss"]


def test_without_a_checkpoint_there_is_no_way_back(
    stage_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, 1)
    cfg = stage_config("pretrain", train_iters=4, save=str(tmp_path), on_bad_step="rollback")
    with pytest.raises(TrainingError, match="no checkpoint in"):
        train(cfg)


@pytest.mark.slow
def test_bad_steps_without_end(
    stage_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, *range(1, 20))
    cfg = stage_config("pretrain", train_iters=19, save=str(tmp_path), on_bad_step="skip")
    with pytest.raises(TrainingError, match=f"{MOST_BAD} bad steps in a row"):
        train(cfg)


def test_what_counts_as_exploding() -> None:
    watch = StepWatch(TrainingOptions(bad_step_factor=100))

    def judge(loss: float, norm: float) -> bool:
        watch._loss = loss
        return watch.judge(norm) is None

    assert all(judge(1.0, 2.0) for _ in range(FEWEST - 1))
    assert judge(1e9, 1e9)  # too few before it to know what is usual
    assert judge(99.0, 199.0)
    assert not judge(101.0, 2.0)
    assert not judge(1.0, 201.0)
    assert not judge(float("inf"), 2.0)
    resumed = StepWatch(TrainingOptions(bad_step_factor=100), watch.state())
    resumed._loss = 101.0
    assert resumed.judge(2.0) is not None
    unlimited = StepWatch(TrainingOptions(bad_step_factor=0), watch.state())
    unlimited._loss = 1e30
    assert unlimited.judge(1e30) is None


def test_a_gradient_of_nothing_but_zeros() -> None:
    watch = StepWatch(TrainingOptions())
    assert watch.judge(0.0) is None
    refuse_learning_nothing(watch, steps=2, last=True)
    refuse_learning_nothing(watch, steps=1, last=False)
    with pytest.raises(TrainingError, match="exactly 0 in the last 1 steps"):
        refuse_learning_nothing(watch, steps=1, last=True)
    for _ in range(FEWEST - 1):
        watch.judge(0.0)
    with pytest.raises(TrainingError, match=f"exactly 0 in the last {FEWEST} steps"):
        refuse_learning_nothing(watch, steps=99, last=False)


@pytest.mark.parametrize("stage", ["warmup", "consistency", "router"])
def test_data_without_an_image_is_refused(
    stage: str, toy_data: ToyData, stage_config: MakeConfig, tmp_path: Path
) -> None:
    texts = write_conversations(tmp_path / "texts", num_samples=12, images_per_sample=(0,))
    data = make_toy_shards(tmp_path / "texts", texts, toy_data.tokenizer)
    with pytest.raises(ConfigError, match="has an image, so that stage"):
        train(stage_config(stage, data_path=(str(data.shards),)))
    if stage == "warmup":
        only = {"data_path": (str(data.shards),), "train_modules": ("connector_4x",)}
        with pytest.raises(ConfigError, match="has an image, so that stage"):
            train(stage_config("pretrain", **only))


def test_a_batch_larger_than_the_data_is_refused(stage_config: MakeConfig) -> None:
    """48 samples in packs of at most four."""
    with pytest.raises(ConfigError, match=r"an epoch of .* has 48 \(in 1\d packs\)"):
        train(stage_config("pretrain", global_batch_size=20))


def test_a_router_whose_policy_is_its_reference_is_refused(
    base_checkpoint: Path, stage_config: MakeConfig
) -> None:
    with pytest.raises(ConfigError, match="its weights are the policy's own"):
        train(stage_config("router", reference_load=str(base_checkpoint)))


@pytest.mark.slow
def test_a_finished_run_is_not_started_again(stage_config: MakeConfig, tmp_path: Path) -> None:
    paths = dict.fromkeys(("save", "load"), str(tmp_path))
    cfg = stage_config("pretrain", train_iters=1, **paths)
    assert train(cfg) == "ended"
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="has done 1 steps and --train-iters is 1"):
        train(cfg)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert train(stage_config("pretrain", train_iters=2, lr_decay_iters=1, **paths)) == "ended"
