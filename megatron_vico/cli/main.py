"""`vico COMMAND ...`: finds the command's file, runs it, and prints a user's error as one line.

Nothing heavy is imported here: megatron takes four seconds, and `vico --help` or `vico doctor` must
not wait for it.
"""

import contextlib
import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any, TextIO, cast

from megatron_vico import __version__
from megatron_vico.cli.rank_failure import end_rank, is_one_of_many, one_line
from megatron_vico.errors import USER_ERRORS, nearest, printable

USER_ERROR = 2
"""Exit status after an error that the user can mend; argparse uses the same."""

FAILURE = 1
"""Exit status of a rank after any other error; Python uses the same."""


COMMANDS = {
    "train": "run one stage: pretrain, warmup, consistency or router",
    "status": "say how far a stage's run is",
    "generate": "ask a model about images",
    "evaluate": "score a model on a file of questions",
    "serve": "answer clients of OpenAI's protocol, a compression plan a model name",
    "table": "print the paper's tables from harness results and request logs",
    "plot": "draw loss curves and what a router does",
    "report": "write one HTML page about a run",
    "convert": "convert checkpoints: Megatron's form, and Hugging Face's layouts",
    "shards": "make, index, inspect and verify WebDataset shards",
    "checkpoint": "say what a checkpoint is, verify its files",
    "plan": "say what a run takes of its GPUs, without them",
    "doctor": "say what is installed and usable, and what falls back to what",
}
"""Each command with its summary; the module of its name in this package has `main(arguments)`."""

ONE_LINE = (*USER_ERRORS, OSError, MemoryError)
"""Errors without a traceback: the user's, and what disk and memory say."""

_NOTES = (
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "MimoModelConfig is experimental",
    "Can't initialize NVML",
    "CUDA initialization",
)
"""Beginnings of warnings that libraries give on each start; `vico doctor` says what they say."""


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
    if words == ["--version"]:
        print(f"megatron_vico {__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        print(
            f"vico: unknown command {name!r}{nearest(name, COMMANDS)}\n\n{_help()}", file=sys.stderr
        )
        return USER_ERROR
    _leave_warnings_to_rank_0()
    _leave_out_notes()
    try:
        with (
            contextlib.redirect_stdout(cast(TextIO, PrintableStream(sys.stdout))),
            contextlib.redirect_stderr(cast(TextIO, PrintableStream(sys.stderr, spared="\r"))),
        ):
            status = importlib.import_module(f"megatron_vico.cli.{name}").main(rest)
    except BrokenPipeError:  # of `vico ... | head`; closing stdout would say so again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except ONE_LINE as error:
        status = USER_ERROR if isinstance(error, USER_ERRORS) else FAILURE
        if is_one_of_many():
            end_rank(error, status=status)
        print(one_line(error), file=sys.stderr)
        return status
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


def _leave_out_notes() -> None:
    if not sys.warnoptions:
        for note in _NOTES:
            warnings.filterwarnings("ignore", re.escape(note))
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no CUDA runtime
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)  # deprecated


class PrintableStream:
    """A stream for text that strangers may have written; see `errors.printable`."""

    def __init__(self, stream: TextIO, *, spared: str = "") -> None:
        """Args: spared: characters to let through: progress bars go back to the line's start."""
        self._stream, self._spared = stream, spared

    def write(self, text: str) -> int:
        """Write `text`; returns how much of it."""
        if self._spared:
            parts = [printable(part) for part in text.split(self._spared)]
            return self._stream.write(self._spared.join(parts))
        return self._stream.write(printable(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vico COMMAND ...",
            "",
            *lines,
            "",
            "`vico COMMAND --help` shows its flags; `vico --version` what is installed.",
        ]
    )
