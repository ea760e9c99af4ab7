"""Which checkpoints of a run are removed once newer ones stand (--keep-last, --keep-every)."""

import os
import shutil
from pathlib import Path

from megatron_vico.checkpoint.integrity import is_complete
from megatron_vico.checkpoint.run_folder import finished_steps, iteration_folder
from megatron_vico.files import unfinished_path


def remove_superseded(
    directory: str | Path, *, newest: int, keep_last: int | None, keep_every: int | None
) -> None:
    """Remove checkpoints that newer whole ones supersede; of two unset numbers, none.

    A checkpoint with missing or cut files is neither removed nor counted as one of the last.

    Args:
        newest: the step that has just been saved.
        keep_last: how many of the newest stay; unset, one.
        keep_every: steps that this number divides stay.
    """
    if keep_last is None and keep_every is None:
        return
    root = Path(directory)
    # Steps after the newest are of a run that was set back; they are written again in their turn.
    steps = [step for step in finished_steps(root) if step <= newest]
    whole = [step for step in steps if is_complete(iteration_folder(root, step))]
    if newest not in whole:
        return
    for step in whole[: -(keep_last or 1)]:
        if keep_every is None or step % keep_every != 0:
            folder = iteration_folder(root, step)
            # Under another name first: a run killed here must not leave half a checkpoint.
            left = unfinished_path(folder)
            os.rename(folder, left)
            shutil.rmtree(left)
