"""`vico COMMAND ...`: finds the command's file, runs it, and prints a user's error as one line.

Nothing heavy is imported here: megatron takes four seconds, and `vico --help` or `vico doctor` must
not wait for it.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from megatron_vico.cli.rank_failure import end_rank, is_one_of_many
from megatron_vico.errors import USER_ERRORS, nearest

USER_ERROR = 2
"""Exit status after an error that the user can mend; argparse uses the same."""

FAILURE = 1
"""Exit status of a rank after any other error; Python uses the same."""


COMMANDS = {
    "train": "run one stage: pretrain, warmup, consistency or router",
    "status": "say how far a stage's run is",
    "generate": "ask a model about images",
    "evaluate": "score a model on a file of questions",
    "plot": "draw loss curves, print the ablation table",
    "report": "write one HTML page about a run",
    "convert": "convert checkpoints: Megatron's form, and Hugging Face's layouts",
    "shards": "make, index, inspect and verify WebDataset shards",
    "checkpoint": "say what a checkpoint is, verify its files",
    "plan": "say what a run takes of its GPUs, without them",
    "doctor": "say what is installed and usable, and what falls back to what",
}
"""Each command with its summary; the module of its name in this package has `main(arguments)`."""

USES_MEGATRON = {"generate", "evaluate", "convert", "checkpoint"}
"""Commands that need megatron for all but their --help: the CPU stand-in goes first. `train` needs
it only to train (cli/train.py)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; None, this process's own.

    Returns:
        Exit status: 0, or 2 after an error of the user's. One of several ranks does not return from
        an error; it ends.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if words else USER_ERROR
    name, *rest = words
    if name not in COMMANDS:
        print(
            f"vico: unknown command {name!r}{nearest(name, COMMANDS)}\n\n{_help()}", file=sys.stderr
        )
        return USER_ERROR
    _leave_warnings_to_rank_0()
    try:
        if name in USES_MEGATRON and not {"-h", "--help"} & set(rest):
            from megatron_vico import cpu_stand_in

            cpu_stand_in.install()
        status = importlib.import_module(f"megatron_vico.cli.{name}").main(rest)
    except USER_ERRORS as error:
        if is_one_of_many():
            end_rank(error, status=USER_ERROR)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return USER_ERROR
    except Exception as error:
        if is_one_of_many():
            end_rank(error, status=FAILURE)
        raise
    return status or 0


def _leave_warnings_to_rank_0() -> None:
    """Libraries warn the same on every rank: 128 times each would bury what one rank says.

    Python's -W and PYTHONWARNINGS win.
    """
    if is_one_of_many() and os.environ.get("RANK") != "0" and not sys.warnoptions:
        warnings.simplefilter("ignore")


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        ["usage: vico COMMAND ...", "", *lines, "", "`vico COMMAND --help` shows its flags."]
    )
