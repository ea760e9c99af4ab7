"""`vico status`: how far a stage is, for the scripts that start it again; no torch is imported."""

import argparse
import json
from collections.abc import Sequence

from megatron_vico.checkpoint.run_folder import find_iteration, latest_iteration
from megatron_vico.config.flags import parse
from megatron_vico.errors import ConfigError

UNFINISHED = 3
"""Exit status where steps are left; 2 is a user's error."""

FIELDS = ("stage", "save", "pretrained_checkpoint", "checkpoint", "iteration", "train_iters")


def main(arguments: Sequence[str]) -> int:
    """Print the state of a stage's run as JSON, or one of its fields as it is.

    Args:
        arguments: the words after `status`.

    Returns:
        0 if its last step has a checkpoint; 3 if steps are left.

    Raises:
        ConfigError: if the run saves nowhere.
        CheckpointError: if its newest checkpoint is not whole.
    """
    parser = argparse.ArgumentParser(
        prog="vico status",
        usage="%(prog)s [--get FIELD] [--recipe RECIPE.yaml] [flags of `vico train`]",
        description="How far a run is. Exit status: 0 finished, 3 steps are left, 2 an error.",
        allow_abbrev=False,
    )
    parser.add_argument("--get", choices=FIELDS, help="print this alone; nothing where it is unset")
    given, rest = parser.parse_known_args(arguments)
    cfg = parse(rest)
    save, train_iters = cfg.checkpoint.save, cfg.training.train_iters
    if save is None:
        raise ConfigError("--save is not set: a run that saves nothing has no state to ask for.")
    iteration = latest_iteration(save)
    state: dict[str, str | int | None] = {
        "stage": cfg.stage.stage,
        "save": save,
        "pretrained_checkpoint": cfg.checkpoint.pretrained_checkpoint,
        "checkpoint": None if iteration is None else str(find_iteration(save)),
        "iteration": iteration or 0,
        "train_iters": train_iters,
    }
    if given.get is None:
        print(json.dumps(state, indent=2))
    else:
        print("" if state[given.get] is None else state[given.get])
    return UNFINISHED if iteration is None or iteration < train_iters else 0
