"""One run owns a --save folder: what is in it is its own, and one process at a time writes there.

    SAVE/run.lock    who writes: host, process, when that started; the file is touched as long as
                     the run lives

A lock whose process is gone is taken over. Of a process on another host only the touching shows
whether it lives, so that one is watched for a while.
"""

import contextlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_vico.checkpoint.run_folder import finished_steps, iteration_folder, read_metadata
from megatron_vico.config.schema import RunConfig
from megatron_vico.errors import CheckpointError
from megatron_vico.files import INCOMPLETE_SUFFIX, open_plain, read_plain, read_yaml, record_of

LOCK = "run.lock"
BEAT_S = 20.0
SILENT_S = 100.0
"""A lock of another host that is not touched for so long is of a dead run: network file systems
show a change after up to a minute."""

_OLD = ".old" + INCOMPLETE_SUFFIX


def check_save_folder(cfg: RunConfig, *, model_name: str) -> None:
    """Refuse a --save folder whose contents this run would overwrite; nothing is written.

    Raises:
        CheckpointError: naming the run that is there, and what to do.
    """
    files = cfg.checkpoint
    assert files.save is not None, "only asked of a run that saves"
    root = Path(files.save)
    steps = finished_steps(root)
    metrics = root / "metrics.jsonl"
    if not steps and not (metrics.is_file() and metrics.stat().st_size):
        return
    found = _identity_of_folder(root, steps)
    own = {
        "stage": cfg.stage.stage,
        "model_size": model_name,
        "seed": cfg.training.seed,
        "data_path": list(cfg.data.data_path),
    }
    resumes = files.load is not None and Path(files.load).resolve() == root.resolve()
    # What a checkpoint knows of seed and data is compared when it is loaded, by the data's
    # fingerprints and not by its paths; --override-data-state may change both.
    compared = ("stage", "model_size") if steps and resumes else tuple(own)
    differing = [
        f"its {name} is {found[name]}, this run's {own[name]}"
        for name in compared
        if name in found and found[name] != own[name]
    ]
    what = f"checkpoints up to {iteration_folder(root, steps[-1]).name}" if steps else "metrics"
    if differing:
        raise CheckpointError(
            f"--save {root} holds {what} of another run: {'; '.join(differing)}; give another"
            " --save."
        )
    if not resumes:
        raise CheckpointError(
            f"--save {root} holds {what} of this run, which would be overwritten; add --load {root}"
            " to go on from there, or give another --save."
        )


def _identity_of_folder(root: Path, steps: list[int]) -> dict[str, Any]:
    """What is known of the run that wrote a folder, by the names of options."""
    found: dict[str, Any] = {}
    with contextlib.suppress(CheckpointError):
        read = read_yaml(root / "config.yaml")
        found = {name: read[name] for name in ("stage", "seed", "data_path") if name in read}
    if steps:
        metadata = read_metadata(root, steps[-1])
        found |= {"stage": metadata.stage, "model_size": metadata.model_size}
    return found


@contextlib.contextmanager
def owned(folder: str | None) -> Iterator[None]:
    """`locked` for all ranks of a run, which all call it; of no folder, nothing."""
    from megatron_vico.checkpoint.ranks import Ranks  # torch

    with contextlib.ExitStack() as stack:
        if folder is not None:
            Ranks.of_run().on_main(lambda: stack.enter_context(locked(folder)))
        yield


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Be the one that writes to a run's folder, which is made; called by the main rank.

    What killed saves have left there is removed. CheckpointError if another run writes there, or
    nobody can.
    """
    root = Path(folder)
    path, own = root / LOCK, _Holder.this_process()
    try:
        root.mkdir(parents=True, exist_ok=True)
        while not _created(path, own):
            _remove_stale(path)
        _sweep(root)
    except OSError as error:
        raise CheckpointError(
            f"--save {root} cannot be written: {error.strerror or error}; mend that, or give"
            " another folder."
        ) from error
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(path)

    threading.Thread(target=beat, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with contextlib.suppress(OSError):
            if _Holder.read(path) == own:
                path.unlink()


@dataclass(frozen=True, kw_only=True)
class _Holder:
    """The process that a lock belongs to."""

    host: str
    """Its name, and the name space that process numbers belong to, as containers have their own."""

    pid: int
    started: float
    """Seconds since 1970: numbers of processes are used again."""

    @classmethod
    def this_process(cls) -> "_Holder":
        space = ""
        with contextlib.suppress(OSError):  # Linux only
            space = f" {os.readlink('/proc/self/ns/pid')}"
        started = psutil.Process().create_time()
        return cls(host=socket.gethostname() + space, pid=os.getpid(), started=started)

    @classmethod
    def read(cls, path: Path) -> "_Holder | None":
        """None for a lock that was not written to its end."""
        try:
            return record_of(cls, json.loads(read_plain(path)))
        except (TypeError, ValueError, RecursionError):
            return None

    def is_alive(self) -> bool:
        try:
            # The kernel's clock may be set: a process number is not used again within seconds.
            return abs(psutil.Process(self.pid).create_time() - self.started) < 3.0
        except psutil.Error:
            return False

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host.split()[0]}, running since {since}"


def _created(path: Path, own: _Holder) -> bool:
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(json.dumps(asdict(own)))
    except OSError:  # the disk is full
        path.unlink()
        raise
    return True


def _remove_stale(path: Path) -> None:
    """Remove a lock whose process is gone; CheckpointError if it lives."""
    try:
        holder = _Holder.read(path)
        here = holder is not None and holder.host == _Holder.this_process().host
        lives = holder.is_alive() if here and holder is not None else _is_touched(path, holder)
        if lives:
            raise CheckpointError(
                f"--save {path.parent}: another run writes there ({holder or path}); wait for its"
                " end, or give another --save."
            )
        # Aside first: had another run taken it over meanwhile, its lock would be removed.
        aside = path.with_name(f"{LOCK}.{os.getpid()}")
        os.rename(path, aside)
        if _Holder.read(aside) != holder:
            os.rename(aside, path)
            return
        aside.unlink()
        print(f"note: {path} was left by a run that is gone ({holder or 'unknown'})", flush=True)
    except FileNotFoundError:
        return  # it ended meanwhile, or another one was faster


def _is_touched(path: Path, holder: _Holder | None) -> bool:
    print(
        f"{path} is of a run elsewhere ({holder or 'unknown'}): watching for up to {SILENT_S:.0f} s"
        " whether it lives",
        flush=True,
    )
    before, end = _touched(path), time.monotonic() + SILENT_S
    while time.monotonic() < end:
        time.sleep(min(BEAT_S / 4, SILENT_S))
        if _touched(path) != before:
            return True
    return False


def _touched(path: Path) -> float:
    with open_plain(path) as file:  # opening it asks the server of a network file system
        return os.fstat(file.fileno()).st_mtime


def _sweep(root: Path) -> None:
    """Remove what killed saves have left; a step that was being replaced is put back."""
    for left in root.glob(f"iter_*{INCOMPLETE_SUFFIX}"):
        replaced = left.with_name(left.name.removesuffix(_OLD))
        if left.name.endswith(_OLD) and not replaced.exists():
            os.rename(left, replaced)
        else:
            shutil.rmtree(left)
