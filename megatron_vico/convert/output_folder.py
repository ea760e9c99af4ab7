"""A folder that appears under its name only when all of it has been written."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_vico.checkpoint.ranks import FAILURES, Ranks
from megatron_vico.errors import CheckpointError, cause_of
from megatron_vico.files import unfinished_path


@contextmanager
def new_folder(path: str | Path, *, ranks: Ranks | None = None) -> Iterator[Path]:
    """Where to write a folder that gets its name when the block ends without error.

    It is beside `path`, and removed if the writing, by all ranks together, fails. What a killed
    writer has left there is removed first: it starts over.

    Raises:
        CheckpointError: on all ranks, if there is something at `path` already, or the disk cannot
            take it.
    """
    # Where links point: a rename can replace an empty folder, but no link to one.
    target, ranks = Path(path).resolve(), ranks or Ranks()
    unfinished = unfinished_path(target)

    def begin() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    ranks.on_main(lambda: _refuse_existing(target))
    try:
        ranks.on_main(begin)
        yield unfinished
        ranks.on_main(lambda: os.replace(unfinished, target))
    except BaseException as error:
        if ranks.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, FAILURES) and not isinstance(error, CheckpointError):
            raise CheckpointError(
                f"could not write {target}: {cause_of(error)}; nothing is left of it."
            ) from error
        raise


def check_space(folder: Path, num_bytes: int) -> None:
    """CheckpointError if the disk of a folder has too little room."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise CheckpointError(
            f"{folder} needs {num_bytes / 1e9:.1f} GB, its disk has {free / 1e9:.1f} GB free;"
            " nothing was written."
        )


def _refuse_existing(target: Path) -> None:
    if os.path.ismount(target):
        raise CheckpointError(
            f"{target} is a mount point, which nothing can be renamed to; name a folder in it."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(
            f"{target} exists already and is not empty; remove it, or write to another folder."
        )
