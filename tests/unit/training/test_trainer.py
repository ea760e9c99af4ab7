"""Whole runs of the real trainer: freezing, bfloat16, errors, and what it refuses to start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vico.checkpoint import training_checkpoint
from megatron_vico.checkpoint.ownership import LOCK
from megatron_vico.checkpoint.run_folder import finished_steps
from megatron_vico.config.schema import RunConfig
from megatron_vico.errors import CheckpointError, ConfigError
from megatron_vico.models.language_model import LanguageModel
from megatron_vico.training import trainer
from megatron_vico.training.trainer import train
from tests.training_runs import (
    ToyData,
    read_metrics,
    untimed,
    weights_of,
)

STAGES = ("pretrain", "warmup", "consistency", "router")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_only_the_stages_modules_change(
    stage: str,
    stage_config: Callable[..., RunConfig],
    base_checkpoint: Path,
    tmp_path: Path,
) -> None:
    base = {"pretrained_checkpoint": str(base_checkpoint)}
    cfg = stage_config(stage, train_iters=2, save=str(tmp_path), weight_decay=0.1, **base)
    train(cfg)
    trained = {
        "pretrain": {"vit", "connector_4x", "language_model"},
        "warmup": {"connector_16x"},
        "consistency": {"connector_4x", "connector_16x", "language_model"},
        "router": {"vir"},
    }[stage]
    for before, after in zip(
        weights_of(cfg, base_checkpoint), weights_of(cfg, tmp_path), strict=True
    ):
        for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
            module = "language_model" if isinstance(before, LanguageModel) else name.split(".")[0]
            dead = any(part in name.split(".") for part in ("attn3", "attn4", "norm3", "norm4"))
            assert torch.equal(old, new) == (module not in trained or dead), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_follows_fp32(
    stage: str, stage_config: Callable[..., RunConfig], base_checkpoint: Path, tmp_path: Path
) -> None:
    """Five steps, all from one checkpoint: fresh weights are others in another format. Measured:
    cross-entropy within 0.9 %, KL (0.01 nats here) within 7 %, router loss within 3 %.

    The router's labels are of KL_one alone: KL_none, of two almost equal models, is below eps. A
    ratio of two such small numbers is rounding in bf16, and each label that it turns is a jump.
    """
    labels = {"router_eps": 1.0} if stage == "router" else {}
    losses = []
    for name, bf16 in (("fp32", False), ("bf16", True)):
        save = str(tmp_path / name)
        base = {"pretrained_checkpoint": str(base_checkpoint)}
        cfg = stage_config(stage, train_iters=5, save=save, bf16=bf16, lr=1e-4, **base, **labels)
        train(cfg)
        losses.append([row["loss"] for row in read_metrics(tmp_path / name)])
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.02 if stage == "pretrain" else 0.15)
    encoder, _ = weights_of(cfg, tmp_path / "bf16")
    assert encoder.connector_16x.linear_1.weight.dtype == torch.bfloat16


@pytest.mark.slow
def test_the_warmup_learns(stage_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Of pretrain and consistency, tests/test_demo_quick.py sees it."""
    train(stage_config("warmup", train_iters=12, save=str(tmp_path), lr=3e-3))
    losses = [row["loss"] for row in read_metrics(tmp_path)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), losses


def raises_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that fails after it has done its work, the given time."""
    calls = []

    def failing(*args: Any, **words: Any) -> Any:
        result = function(*args, **words)
        calls.append(result)
        if len(calls) == call:
            raise ArithmeticError("the cause")
        return result

    return failing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "call", "saved"),
    [
        ("compute_gradients", 3, 2),  # the step has taken its packs, and ratios for the threshold
        ("validation_figures", 1, 2),
        ("update_weights", 3, None),  # nobody knows what of it was done
        ("compute_gradients", 1, None),
    ],
)
def test_an_error_leaves_a_checkpoint_of_the_last_whole_step(
    where: str,
    call: int,
    saved: int | None,
    toy_data: ToyData,
    stage_config: Callable[..., RunConfig],
    plain_run: Callable[[str], tuple[Path, dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run goes on from it bit for bit."""
    whole, options = plain_run("router")  # validation does not change it
    options = options | {"valid_data_path": (str(toy_data.shards),), "eval_iters": 1}
    options |= {"eval_interval": 2, **dict.fromkeys(("save", "load"), str(tmp_path / "cut"))}
    with monkeypatch.context() as patch:
        patch.setattr(trainer, where, raises_at(call, getattr(trainer, where)))
        with pytest.raises(ArithmeticError, match="the cause"):
            train(stage_config("router", **options))
    assert training_checkpoint.latest_iteration(tmp_path / "cut") == saved
    assert ("is saved before the run ends" in capsys.readouterr().out) == (saved is not None)
    assert not (tmp_path / "cut" / LOCK).exists()
    train(stage_config("router", **options))
    found, expected = (
        [untimed(row) for row in read_metrics(folder) if "valid_loss" not in row]
        for folder in (tmp_path / "cut", whole)
    )
    assert found == expected


@pytest.mark.slow
def test_what_a_run_left_is_never_overwritten(
    stage_config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Started again without --load, without its pointer, with another --save."""
    run = tmp_path / "run"
    train(stage_config("warmup", train_iters=3, save=str(run), save_interval=1, keep_last=2))
    assert finished_steps(run) == [2, 3]
    assert next((run / "iter_0000003").glob("frozen_*")).stat().st_nlink == 2
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"up to iter_0000003 of this run.*add --load"):
        train(stage_config("warmup", save=str(run)))
    with pytest.raises(CheckpointError, match="its stage is warmup, this run's pretrain"):
        train(stage_config("pretrain", save=str(run), load=str(run)))
    (run / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(CheckpointError, match=r"but no latest.*`echo 3 > "):
        train(stage_config("warmup", save=str(run), load=str(run)))
    assert (run / "metrics.jsonl").read_bytes() == before
    (run / "latest_checkpointed_iteration.txt").write_text("3\n")
    with pytest.raises(ConfigError, match="gone holds no checkpoint to resume from"):
        train(stage_config("warmup", save=str(tmp_path / "new"), load=str(tmp_path / "gone")))
    capsys.readouterr()
    train(stage_config("warmup", train_iters=4, save=str(tmp_path / "new"), load=str(run)))
    samples = sum(row["samples"] for row in (*read_metrics(run), *read_metrics(tmp_path / "new")))
    assert f"consumed samples: {samples:12d} |" in capsys.readouterr().out
    assert next((tmp_path / "new" / "iter_0000004").glob("frozen_*")).stat().st_nlink == 3
