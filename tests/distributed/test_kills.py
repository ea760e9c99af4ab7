"""A run that is killed again and again, at any moment, is the run that was never killed, and leaves
nothing behind.

    python -m tests.distributed.test_kills 20
"""

import math
import os
import random
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from megatron_vico.checkpoint.integrity import damage
from megatron_vico.checkpoint.ownership import LOCK
from megatron_vico.checkpoint.run_folder import finished_steps, iteration_folder
from megatron_vico.convert.megatron.reader import open_dcp
from tests.distributed import programs
from tests.training_runs import ToyData, make_toy_data, read_metrics, untimed

KILLS = 3
LONGEST_S = 1.0
"""After a step was logged: some steps, and a save after each."""
LIMIT_S = 240


def start(data: ToyData, save: Path, log: Path, *, steps: int) -> BaseProcess:
    """A run as a user starts it; it saves each step and keeps two."""
    words = f"""
        -m megatron_vico train --stage pretrain --data-path {data.shards}
        --tokenizer-model {data.tokenizer} --save {save} --load {save}
        --train-iters {steps} --save-interval 1 --keep-last 2 --seq-length 600
        --max-tiles-per-pack 40 --max-samples-per-pack 4 --max-dynamic-patch 4
        --global-batch-size 2 --num-workers 1
    """.split()
    return programs.start(words, log=log)


def left_of(session: int) -> list[psutil.Process]:
    """Processes that a run has started and that are still there."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (OSError, psutil.Error):
            continue
    return found


def wait_for_a_step(process: BaseProcess, metrics: Path, log: Path) -> None:
    """Until a run has logged one, or is over."""
    end, least = time.monotonic() + LIMIT_S, math.inf
    while process.is_alive():
        size = metrics.stat().st_size if metrics.exists() else 0
        least = min(least, size)  # it begins by dropping lines after its checkpoint
        if size > least:
            return
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.02)
    assert process.exitcode == 0, log.read_text()[-3000:]


def wait_for_its_processes(session: int) -> None:
    """Workers look for the run once a second."""
    end = time.monotonic() + LIMIT_S
    while left := left_of(session):
        assert time.monotonic() < end, left
        time.sleep(0.1)


def kill_and_resume(folder: Path, data: ToyData, *, kills: int, seed: int) -> None:
    """Compare a run with `kills` kills to one without."""
    draw, log, steps = random.Random(seed), folder / "log.txt", 4 * kills
    cut, whole = folder / "cut", folder / "whole"
    for _ in range(kills):
        process = start(data, cut, log, steps=steps)
        wait_for_a_step(process, cut / "metrics.jsonl", log)
        time.sleep(draw.uniform(0, LONGEST_S))
        process.kill()
        process.join()
        wait_for_its_processes(process.pid)
        assert not list(Path("/dev/shm").glob(f"*_{process.pid}_*"))
    for save in (cut, whole):
        process = start(data, save, log, steps=steps)
        process.join(LIMIT_S)
        assert process.exitcode == 0, log.read_text()[-3000:]
        wait_for_its_processes(process.pid)
        assert finished_steps(save) == [steps - 1, steps]
        assert not list(save.glob("*.incomplete"))
        assert not (save / LOCK).exists()
        assert damage(iteration_folder(save, steps)) == []
    for found, expected in zip(read_metrics(cut), read_metrics(whole), strict=True):
        assert untimed(found) == untimed(expected)
    one, other = (open_dcp(iteration_folder(save, steps)) for save in (cut, whole))
    assert one.tensors.keys() == other.tensors.keys()
    for name in one.tensors:
        assert bool((one.read_tensor(name) == other.read_tensor(name)).all()), name


@pytest.mark.slow
def test_kills(toy_data: ToyData, tmp_path: Path) -> None:
    kill_and_resume(tmp_path, toy_data, kills=KILLS, seed=0)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        kills = int(sys.argv[1])
        kill_and_resume(Path(made), make_toy_data(Path(made) / "data"), kills=kills, seed=1)
        print(f"{kills} of {kills} kills: the run is the same bit for bit, and nothing is left")
