"""Whose a --save folder is: what a run may go on with, what it may not touch, and who writes."""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from megatron_vico.checkpoint import ownership
from megatron_vico.checkpoint.ownership import LOCK, check_save_folder, locked
from megatron_vico.config.flags import parse, to_yaml
from megatron_vico.errors import CheckpointError
from tests.run_folders import write_step

WORDS = "--stage warmup --data-path /data/a --seed 7 --save {save}"


def left_behind(folder: Path, *, step: int | None = 3, stage: str = "warmup") -> Path:
    """A run's folder: its configuration, metrics and, unless None, a checkpoint."""
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(parse(WORDS.format(save=folder).split())))
    (folder / "metrics.jsonl").write_text('{"iteration": 1, "loss": 2.0}\n')
    if step is not None:
        write_step(folder, step, stage=stage)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("step", "change", "message"),
    [
        (3, "", "checkpoints up to iter_0000003 of this run.*add --load {save} to go on"),
        (None, "", "holds metrics of this run.*add --load {save} to go on"),
        (3, "--load {save}", None),
        (None, "--load {save}", None),
        (3, "--load {save}/../other", "of this run.*add --load"),
        (3, "--load {save} --stage router", "of another run: its stage is warmup, this run's rout"),
        (3, "--load {save} --model-size toy-moe", "its model_size is toy, this run's toy-moe"),
        # What was drawn and read is compared with the checkpoint's own record.
        (3, "--load {save} --seed 8 --data-path /moved/a", None),
        (None, "--load {save} --seed 8", "of another run: its seed is 7, this run's 8;"),
        (None, "--load {save} --data-path /data/b", r"its data_path is \['/data/a'\], this run's"),
    ],
)
def test_a_folder_that_is_not_empty(
    step: int | None, change: str, message: str | None, tmp_path: Path
) -> None:
    save = left_behind(tmp_path / "run", step=step)
    before = contents(save)
    cfg = parse(f"{WORDS} {change}".format(save=save).split())
    model = cfg.model.model_size or "toy"
    if message is None:
        check_save_folder(cfg, model_name=model)
    else:
        with pytest.raises(CheckpointError, match=message.format(save=save)):
            check_save_folder(cfg, model_name=model)
    assert contents(save) == before


def test_a_converted_checkpoint_is_no_place_to_save_in(tmp_path: Path) -> None:
    save = left_behind(tmp_path / "run", step=0, stage="converted")
    cfg = parse(f"{WORDS} --load {save}".format(save=save).split())
    with pytest.raises(CheckpointError, match="its stage is converted, this run's warmup"):
        check_save_folder(cfg, model_name="toy")


HOLD = """
import sys, time
from megatron_vico.checkpoint import ownership
ownership.BEAT_S = 0.2
with ownership.locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_one_process_at_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with held_elsewhere(run) as other:
        with (
            pytest.raises(
                CheckpointError, match=rf"another run writes there \(process {other.pid}"
            ),
            locked(run),
        ):
            pass
        assert (run / LOCK).exists()
        # Of another host: whether it lives shows in the file alone.
        holder = json.loads((run / LOCK).read_text())
        (run / LOCK).write_text(json.dumps(holder | {"host": "elsewhere"}))
        monkeypatch.setattr(ownership, "BEAT_S", 0.2)
        monkeypatch.setattr(ownership, "SILENT_S", 30.0)
        started = time.monotonic()
        with pytest.raises(CheckpointError, match="on elsewhere, running since"), locked(run):
            pass
        assert time.monotonic() - started < 20
    monkeypatch.setattr(ownership, "SILENT_S", 0.5)
    with locked(run):  # killed, and silent
        assert json.loads((run / LOCK).read_text())["pid"] == os.getpid()
    assert not (run / LOCK).exists()
    assert "was left by a run that is gone" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["gone", "number used again", "half written"])
def test_stale_locks(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "SILENT_S", 0.2)
    with locked(tmp_path):
        holder = json.loads((tmp_path / LOCK).read_text())
    assert holder["started"] == psutil.Process().create_time()
    holder |= {"gone": {"pid": 2**22 + 1}, "number used again": {"started": 1.0}}.get(kind, {})
    text = json.dumps(holder)
    (tmp_path / LOCK).write_text(text[:20] if kind == "half written" else text)
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_what_killed_saves_left_is_removed_and_a_replaced_step_put_back(tmp_path: Path) -> None:
    for name in ("iter_0000002.incomplete", "iter_0000001.old.incomplete", "iter_0000001", "plots"):
        (tmp_path / name).mkdir()
    (tmp_path / "iter_0000003.old.incomplete").mkdir()  # killed between two renames
    with locked(tmp_path):
        names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["iter_0000001", "iter_0000003", "plots", LOCK]


def test_a_full_disk_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(holder: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ownership, "asdict", full)
        with pytest.raises(CheckpointError, match="written: No space left"), locked(tmp_path):
            pass
    assert not list(tmp_path.iterdir())
    with locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with (
            pytest.raises(CheckpointError, match=r"cannot be written: .*; mend that"),
            locked(folder),
        ):
            pass
    with (
        pytest.raises(CheckpointError, match=r"cannot be written: (Read-only|Permission|No such)"),
        locked("/proc/run"),
    ):
        pass
