"""The demo's driver: its commands fit together; it logs, stops at a failure and resumes."""

import sys
from dataclasses import replace
from unittest.mock import Mock

import pytest
import run

from megatron_vico.config.flags import parse
from megatron_vico.config.validate import validate
from tests.run_folders import write_step


def training_configs(folder, *, quick):
    found = {}
    for step in run.steps(folder, quick=quick, processes=2, seed=7):
        if "train" in step.command:
            found[step.name] = parse(step.command[step.command.index("train") + 1 :])
    return found


@pytest.mark.parametrize("quick", [False, True])
def test_every_training_stage_is_a_valid_run_that_starts_from_the_one_before(tmp_path, quick):
    configs = training_configs(tmp_path, quick=quick)
    assert list(configs) == ["pretrain", "warmup", "consistency", "router", "router_image"]
    finished = set()
    for name, cfg in configs.items():
        validate(cfg, world_size=2)
        assert cfg.training.seed == 7
        assert cfg.checkpoint.save == cfg.checkpoint.load == str(tmp_path / name)
        assert (cfg.checkpoint.pretrained_checkpoint is not None) == cfg.stage.spec.needs_reference
        for source in (cfg.checkpoint.pretrained_checkpoint, cfg.stage.reference_load):
            assert source is None or source in finished
        assert cfg.training.train_iters > cfg.optimizer.lr_warmup_iters
        finished.add(cfg.checkpoint.save)
    # Eq. 2 compares with the model from before consistency training.
    assert configs["router"].stage.reference_load == str(tmp_path / "pretrain")
    assert [configs[name].stage.router_granularity for name in ("router", "router_image")] == [
        "tile",
        "image",
    ]


def test_recipes_alone_describe_the_same_chain():
    for stage in run.STAGES:
        cfg = parse(["--recipe", str(run.HERE / "recipes" / f"{stage.name}.yaml")])
        assert cfg.checkpoint.save == cfg.checkpoint.load == f"runs/demo/{stage.name}"
        assert cfg.checkpoint.pretrained_checkpoint == (
            f"runs/demo/{stage.start}" if stage.start else None
        )
        assert cfg.stage.reference_load == (
            f"runs/demo/{stage.reference}" if stage.reference else None
        )
        assert cfg.optimizer.min_lr == pytest.approx(0.02 * cfg.optimizer.lr)


def test_no_two_steps_write_the_same_output(tmp_path):
    outputs = [
        name
        for step in run.steps(tmp_path, quick=False, processes=2, seed=0)
        for name in step.outputs
    ]
    assert len(set(outputs)) == len(outputs)


def step(name, code, **fields):
    return run.Step(
        name=name,
        command=[sys.executable, "-c", code],
        outputs=(f"{name}.out",),
        shows="show",
        **fields,
    )


def test_output_goes_to_the_log_and_what_matters_to_the_terminal(tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    code = (
        r"print('quiet'); print('show this'); print('\rbar: 10%|#\rbar: 100%|# 1s\rbar: 100%|# 2s')"
    )
    assert run.execute(step("talk", code), tmp_path) == 0
    assert capsys.readouterr().out.split("\n") == ["  show this", "  bar: 100%|# 1s", ""]
    assert (tmp_path / "logs" / "talk.log").read_text().split("\n") == [
        "quiet",
        "show this",
        "bar: 100%|# 1s",
        "",
    ]


def call_main(monkeypatch, tmp_path, steps, *flags):
    monkeypatch.setattr(run, "steps", lambda *args, **kwargs: steps)
    monkeypatch.setattr(run, "_report", lambda folder: print(f"report {folder.name}"))
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path / "out"), *flags])
    return run.main()


def writes(tmp_path, name, then=""):
    return f"open(r'{tmp_path}/out/{name}.out', 'a').write('x'); print('show {name}'); {then}"


def test_a_failure_stops_and_resume_goes_on_from_it(monkeypatch, tmp_path, capsys):
    flag = tmp_path / "mended"
    fails = f"import os, sys; sys.exit(0 if os.path.exists(r'{flag}') else 3)"
    steps = [
        step("first", writes(tmp_path, "first")),
        step("second", writes(tmp_path, "second", fails), goes_on=True),
        step("third", writes(tmp_path, "third")),
    ]
    assert call_main(monkeypatch, tmp_path, steps) == 3
    shown = capsys.readouterr().out
    assert "step 'second' failed with status 3" in shown
    assert "second.log" in shown
    assert "report" not in shown
    flag.touch()
    assert call_main(monkeypatch, tmp_path, steps, "--resume") == 0
    shown = capsys.readouterr().out
    assert "[1/3] first: done already" in shown
    assert "report out" in shown
    contents = {
        name: (tmp_path / "out" / f"{name}.out").read_text()
        for name in ("first", "second", "third")
    }
    assert contents == {
        "first": "x",
        "second": "xx",
        "third": "x",
    }  # a stage goes on with what it had


def test_the_start_says_what_is_needed_and_a_full_disk_stops_it(monkeypatch, tmp_path, capsys):
    steps = [step("first", writes(tmp_path, "first"))]
    free = Mock(free=100 * 10**6)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda folder: free)
    assert call_main(monkeypatch, tmp_path, steps) == 2
    shown = capsys.readouterr().out
    assert f"{run.FULL_NEEDS.disk_mb} MB of disk in {tmp_path / 'out'}" in shown
    assert "only 100 MB of disk are free" in shown
    assert not (tmp_path / "out" / "first.out").exists()
    assert call_main(monkeypatch, tmp_path, steps, "--resume") == 0


def test_a_new_run_forgets_the_old_one(monkeypatch, tmp_path, capsys):
    steps = [step("first", writes(tmp_path, "first"), goes_on=True)]
    for _ in range(2):
        assert call_main(monkeypatch, tmp_path, steps) == 0
        assert (tmp_path / "out" / "first.out").read_text() == "x"
    assert "done already" not in capsys.readouterr().out


def test_a_stage_that_was_killed_before_its_mark_is_not_begun_again(monkeypatch, tmp_path, capsys):
    saved = tmp_path / "out" / "first.out"
    write_step(saved, 2)
    first = step("first", "raise SystemExit(4)", goes_on=True)
    flags = ["train", "--stage", "pretrain", "--save", str(saved), "--train-iters"]
    for left, status in ((3, 4), (2, 0)):
        steps = [replace(first, command=[*first.command, *flags, str(left)])]
        assert call_main(monkeypatch, tmp_path, steps, "--resume") == status
        assert ("first: done already" in capsys.readouterr().out) == (status == 0)
