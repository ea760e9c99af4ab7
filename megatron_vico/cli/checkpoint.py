"""`vico checkpoint`: what a run's folder holds, without reading its tensors."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> None:
    """Print a checkpoint's metadata.

    Args:
        arguments: the words after `checkpoint`.

    Raises:
        CheckpointError: if the folder holds no finished checkpoint.
    """
    parser = argparse.ArgumentParser(prog="vico checkpoint", description=__doc__)
    parser.add_argument("folder", type=Path, help="the --save folder of a run")
    parser.add_argument("--ckpt-step", type=int, help="which step; unset, the latest")
    options = parser.parse_args(arguments)
    from megatron_vico.checkpoint import state

    metadata = state.read_metadata(options.folder, options.ckpt_step)
    print(state.find_iteration(options.folder, options.ckpt_step))
    for name, value in dataclasses.asdict(metadata).items():
        print(f"  {name}: {value}")
