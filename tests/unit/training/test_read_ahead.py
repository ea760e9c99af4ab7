"""The next step's packs are read while a step is computed, and no run can tell."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vico.checkpoint.run_folder import latest_iteration
from megatron_vico.config.schema import RunConfig
from megatron_vico.data.load.loader import Loader
from megatron_vico.errors import SampleError
from megatron_vico.training import trainer
from megatron_vico.training.bad_steps import StepWatch
from megatron_vico.training.read_ahead import ReadAhead
from megatron_vico.training.trainer import train
from tests.training_runs import read_metrics, untimed

MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a run does, as it does it."""
    seen: list[str] = []
    for what, owner, name in (
        ("gradients", trainer, "compute_gradients"),
        ("update", trainer, "update_weights"),
        ("save", trainer, "_save"),
        ("read", Loader, "_without_known"),
    ):

        def noted(*args: Any, what: str, function: Callable[..., Any]) -> Any:
            seen.append(what)
            return function(*args)

        function = getattr(owner, name)
        patched = functools.partialmethod if owner is Loader else functools.partial
        monkeypatch.setattr(owner, name, patched(noted, what=what, function=function))
    return seen


@pytest.mark.slow
def test_a_step_is_read_under_the_one_before(
    order: list[str], stage_config: MakeConfig, tmp_path: Path
) -> None:
    """But behind a checkpoint, which then knows all that was read."""
    train(stage_config("pretrain", train_iters=4, save_interval=3, save=str(tmp_path)))
    step, alone = ["gradients", "read", "update"], ["gradients", "update", "save"]
    steps = [what for what, _ in itertools.groupby(order)]  # a block after the other is read
    assert steps == ["read", *step, *step, *alone, "read", *alone]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_losses_are_those_of_a_run_that_reads_step_by_step(
    num_workers: int, stage_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and after an end between a batch's reading and its turn too."""
    make = functools.partial(stage_config, "pretrain", train_iters=4, num_workers=num_workers)
    train(make(save=str(tmp_path / "ahead")))
    paths = dict.fromkeys(("save", "load"), str(tmp_path / "cut"))

    with monkeypatch.context() as patch:
        begin, steps = StepWatch.begin, []

        def second_fails(watch: StepWatch, sums: Any) -> None:
            steps.append(sums)
            if len(steps) == 2:
                raise RuntimeError("after the third batch was read")
            begin(watch, sums)

        patch.setattr(StepWatch, "begin", second_fails)
        with pytest.raises(RuntimeError, match="third batch"):
            train(make(**paths))
    assert latest_iteration(tmp_path / "cut") == 1
    train(make(**paths))
    monkeypatch.setattr(ReadAhead, "fetch", lambda self: None)
    train(make(save=str(tmp_path / "plain")))
    ahead, cut, plain = (
        [untimed(row) for row in read_metrics(tmp_path / name)]
        for name in ("ahead", "cut", "plain")
    )
    assert len(plain) == 4
    assert ahead == plain
    assert cut == plain


def test_what_is_wrong_with_a_batch_is_told_in_its_own_step(
    stage_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that it was read under is done, logged and saved."""
    give, given = Loader._without_known, []

    def third_is_broken(loader: Loader, block: Any) -> Any:
        given.append(block)
        if len(given) == 5:  # two to a step
            raise SampleError("sample 'x': broken")
        return give(loader, block)

    monkeypatch.setattr(Loader, "_without_known", third_is_broken)
    with pytest.raises(SampleError, match="sample 'x': broken"):
        train(stage_config("pretrain", train_iters=4, save=str(tmp_path)))
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [1, 2]
    assert latest_iteration(tmp_path) == 2
