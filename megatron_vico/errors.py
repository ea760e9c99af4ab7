"""The errors a user can meet; each message says what was found, what was expected and the fix."""

import difflib
import re
from collections.abc import Iterable
from typing import Literal

Cause = Literal["unreadable shard", "broken image", "bad text"]
"""What can be wrong with a sample, for the table of an exceeded error budget."""


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text of strangers without what moves a terminal's cursor or turns its lines around."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Printable(Exception):
    def __str__(self) -> str:
        """The message, which may hold names and keys that strangers gave."""
        return printable(super().__str__())


class ConfigError(_Printable, ValueError):
    """A flag, recipe or layout that cannot work; raised before a run takes memory or groups."""


class SampleError(_Printable, ValueError):
    """A training or evaluation sample that cannot be used; names the sample's key."""

    def __init__(self, message: str, *, cause: Cause = "bad text") -> None:
        """Text is the cause unless another is named: most checks of a sample are of its text."""
        super().__init__(message)
        self.cause: Cause = cause


class WorkerError(_Printable, RuntimeError):
    """A worker process of the loader that died; says how to make the workers smaller."""


class CheckpointError(_Printable, RuntimeError):
    """A checkpoint that is broken, incomplete or of another model; names the file or tensor."""


class TrainingError(RuntimeError):
    """A run that must not go on: it diverges, or nothing is learned; says what to look at."""


class ReadingStopped(Exception):
    """A loader that was told to stop while it waited for its workers."""


USER_ERRORS = (ConfigError, SampleError, WorkerError, CheckpointError, TrainingError)
"""The errors that are printed as one line, without a traceback."""


def cause_of(error: BaseException) -> str:
    """What went wrong, in a line; torch's CheckpointException says it rank by rank."""
    failures = getattr(error, "failures", None)  # rank -> (exception, traceback)
    if not failures:
        return _message(error)
    causes: dict[str, int] = {}
    for rank, wrapped in failures.items():
        causes.setdefault(_message(wrapped[0]), rank)
    return "; ".join(f"rank {rank}: {cause}" for cause, rank in causes.items())


def _message(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that names the known name closest to `name`, for error messages.

    Args:
        name: what the user wrote.
        known: the names that would have been accepted.

    Returns:
        `"; did you mean 'x'?"`, or an empty string where nothing is close.
    """
    bare = {each.strip("-"): each for each in known}  # two dashes alone make short flags alike
    close = difflib.get_close_matches(name.strip("-"), bare, n=1, cutoff=0.65)
    return f"; did you mean {bare[close[0]]!r}?" if close else ""


def listed(names: Iterable[str], *, limit: int = 10) -> str:
    """Names for an error message, the first few of them; `none` where there are none."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more
