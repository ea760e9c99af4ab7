"""The errors a user can meet; each message says what was found, what was expected and the fix."""

import difflib
from collections.abc import Iterable
from typing import Literal

Cause = Literal["unreadable shard", "broken image", "bad text"]
"""What can be wrong with a sample, for the table of an exceeded error budget."""


class ConfigError(ValueError):
    """A flag, recipe or layout that cannot work; raised before any process group or memory is
    taken."""


class SampleError(ValueError):
    """A training or evaluation sample that cannot be used; names the sample's key."""

    def __init__(self, message: str, *, cause: Cause = "bad text") -> None:
        """Args: cause: text unless another is named, since all but two checks of a sample are of
        its text."""
        super().__init__(message)
        self.cause: Cause = cause


class WorkerError(RuntimeError):
    """A worker process of the loader that died; says how many there are and what makes them
    smaller."""


class CheckpointError(RuntimeError):
    """A checkpoint that is broken, incomplete or of another model; names the file or tensor."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that names the known name closest to `name`, for error messages.

    Args:
        name: what the user wrote.
        known: the names that would have been accepted.

    Returns:
        `"; did you mean 'x'?"`, or an empty string where nothing is close.
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def listed(names: Iterable[str], *, limit: int = 10) -> str:
    """Names for an error message, the first few of them; `none` where there are none."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more
