"""Saves and loads training checkpoints on every rank of a torchrun launch; started by
test_checkpoint.py.

Usage: run_checkpoint.py FOLDER. Under FOLDER, `OPTIMIZER-DTYPE/` gets steps 1 and 2 of a run, and
each rank writes what it found as `OPTIMIZER-DTYPE-RANK.pt`.
"""

import errno
import sys
from pathlib import Path
from typing import Any

from megatron_vico import cpu_stand_in


def main() -> None:
    """Every kind of optimizer and number format, then a save that one rank cannot finish."""
    cpu_stand_in.install()
    import torch

    from megatron_vico.config.schema import ParallelOptions
    from megatron_vico.parallel.groups import started

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with started(ParallelOptions(), seed=1, timeout_minutes=1) as groups:
        for optimizer in ("replicated", "sharded"):
            for dtype in ("fp32", "bf16"):
                name = f"{optimizer}-{dtype}"
                found = save_and_resume(folder / name, groups, optimizer, dtype)
                torch.save(found, folder / f"{name}-{groups.dp_rank}.pt")
        torch.save(
            save_on_a_full_disk(folder / "full", groups), folder / f"full-{groups.dp_rank}.pt"
        )


def save_and_resume(folder: Path, groups: Any, optimizer: str, dtype: str) -> dict[str, Any]:
    """Weights of a run after three steps: uninterrupted, and resumed after the second by other
    objects."""
    from tests.checkpoint_runs import make_training

    one = make_training("toy-6b", groups=groups, seed=1, dtype=dtype, optimizer=optimizer)
    for number in (1, 2):
        one.step(number)
        one.save(folder, number, {"iteration": number})
    other = make_training("toy-6b", groups=groups, seed=2, dtype=dtype, optimizer=optimizer)
    trainer_state = other.load(folder)
    loaded = other.tensors()
    one.step(3)
    other.step(3)
    return {
        "trainer_state": trainer_state,
        "loaded": loaded,
        "whole": one.tensors(),
        "resumed": other.tensors(),
    }


def save_on_a_full_disk(folder: Path, groups: Any) -> dict[str, Any]:
    """What a rank is told when rank 0's disk is full, for the tensors and then for the pointer
    file."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_vico.checkpoint import run_folder
    from megatron_vico.errors import CheckpointError
    from tests.checkpoint_runs import make_training

    one = make_training("toy-6b", groups=groups, seed=1, optimizer="sharded")
    one.step(1)
    one.save(folder, 1)
    full = OSError(errno.ENOSPC, "No space left on device")
    whole = filesystem_async._write_item, run_folder.write_text

    def fail(*args: object, **kwargs: object) -> None:
        raise full

    told = []
    for module, name in (
        (filesystem_async, "_write_item"),
        (run_folder, "write_text"),
    ):
        if groups.is_main:
            setattr(module, name, fail)
        try:
            one.save(folder, 2)
        except CheckpointError as error:
            told.append(str(error))
        filesystem_async._write_item, run_folder.write_text = whole
    latest = run_folder.latest_iteration(folder)
    one.load(folder)
    return {"told": told, "latest": latest, "left": sorted(path.name for path in folder.iterdir())}


if __name__ == "__main__":
    main()
