"""`vico checkpoint verify`: whether the files of a folder are as they were written."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from megatron_vico.cli.command_line import read
from megatron_vico.errors import CheckpointError

DAMAGED = 1
"""Exit status where a file is damaged; 2 is an error, such as a folder without checksums."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Read all files of a folder, and compare them with the checksums written with it.

    Exit status: 0 if all are intact, 1 if one is damaged, 2 where that cannot be known.
    """

    folder: Positional[Path]
    """A run's --save folder (all of its steps), one of its iter_ folders, or an exported one."""


def main(arguments: Sequence[str]) -> int:
    """Print a line about each folder, and one about each damaged file.

    Args:
        arguments: the words after `checkpoint verify`.

    Returns:
        0, or DAMAGED.

    Raises:
        CheckpointError: if a folder has no checksums, or there is none.
    """
    options = read(Flags, arguments, prog="vico checkpoint verify")
    from megatron_vico.checkpoint.integrity import CHECKSUMS, damage, read_checksums
    from megatron_vico.checkpoint.run_folder import finished_steps, iteration_folder
    from megatron_vico.files import refuse_incomplete

    root = options.folder
    refuse_incomplete(root)
    steps = finished_steps(root)
    folders = [iteration_folder(root, step) for step in steps] or [root]
    unknown, damaged = [], False
    for folder in folders:
        found = damage(folder)
        if found is None:
            unknown.append(str(folder))
            continue
        num_files = len(read_checksums(folder) or {})
        print(
            f"{folder}: {len(found)} of {num_files} files damaged"
            if found
            else f"{folder}: {num_files} files intact"
        )
        for clause in found:
            print(f"  {clause}")
        damaged = damaged or bool(found)
    if unknown:
        kind = "" if steps or re.fullmatch(r"iter_\d+", root.name) else ", or by another program"
        raise CheckpointError(
            f"{', '.join(unknown)}: no {CHECKSUMS}, so whether the files are as they were written"
            f" cannot be known: saved before there were checksums{kind}."
        )
    return DAMAGED if damaged else 0
