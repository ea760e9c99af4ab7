"""A command's flags: the fields of a frozen dataclass, whose docstrings are their help.

tyro reads them, as it does `train`'s (config/flags.py). What is heavy is imported where a command
does its work, so that its --help does not wait for torch.
"""

import contextlib
import io
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tyro

from megatron_vico.config.flags import READING, filled
from megatron_vico.config.schema import flag_of
from megatron_vico.errors import ConfigError


def read[Flags](flags: type[Flags], words: Sequence[str], *, prog: str) -> Flags:
    """The flags of a command.

    Args:
        flags: its dataclass.
        words: of the command line, those behind `prog`.
        prog: for the help.

    Raises:
        SystemExit: with status 2 if a flag is unknown (the nearest one is named), lacks a value or
            has a wrong one; with status 0 after --help.
        ConfigError: from the dataclass's `__post_init__`.
    """
    with _reading():
        return tyro.cli(flags, args=words, prog=prog, config=READING)


def read_action(
    actions: Mapping[str, Any], words: Sequence[str], *, prog: str, description: str | None
) -> Any:
    """The flags of one of a command's actions; `actions` are their dataclasses, else as `read`."""
    with _reading():
        return tyro.extras.subcommand_cli_from_dict(
            dict(actions), args=words, prog=prog, description=description, config=READING
        )


def refuse_less(flags: Any, **least: float) -> None:
    """ConfigError if a number is less than the least of any use, infinite or NaN; None is unset."""
    for name, minimum in least.items():
        value = getattr(flags, name)
        if value is not None and not minimum <= value < math.inf:
            raise ConfigError(f"{flag_of(name)} {value}: expected {minimum} or more.")


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Help without the line breaks of docstrings; what a dataclass refuses itself as its error."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as shown,
        contextlib.redirect_stderr(io.StringIO()) as wrong,
    ):
        try:
            yield
            return
        except SystemExit as error:
            stop = error
    cause = stop.__context__
    while cause is not None:  # tyro's own errors lie between
        if isinstance(cause, ConfigError):
            raise cause from None
        cause = cause.__context__
    print(filled(shown.getvalue()), end="")
    print(wrong.getvalue(), end="", file=sys.stderr)
    raise stop
