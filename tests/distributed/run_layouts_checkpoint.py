"""Saves training checkpoints under some layouts and resumes them under others; started by
test_checkpoint_layouts.py.

Usage: run_layouts_checkpoint.py FOLDER [CASE ...], by torchrun with 4 processes. FOLDER/RANK.pt is
what a rank found.
"""

import sys
from pathlib import Path

from megatron_vico import cpu_stand_in


def main() -> None:
    """All cases, or those named; imports stand here because each save starts a process that imports
    this file again."""
    cpu_stand_in.install()
    import torch

    from tests.distributed.layouts_checkpoint import run_cases

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    folder = Path(sys.argv[1])
    torch.save(run_cases(folder, sys.argv[2:]), folder / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
