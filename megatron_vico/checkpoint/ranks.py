"""The processes that share work on files: who does which part, and how one's failure ends all.

Nothing here needs a GPU or megatron-core's groups: they talk through gloo, or there is only one of
them.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.distributed.checkpoint import CheckpointException

from megatron_vico.errors import CheckpointError, cause_of

FAILURES = (OSError, CheckpointException, CheckpointError)
"""What reading and writing can fail with; anything else is a bug and ends its process."""

_PATIENCE = timedelta(days=7)
"""What a rank waits for the others, whose last file may take hours; torch's half hour would end a
whole conversion. A rank that dies ends the others all the same: the launcher sees to it."""


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """How an action failed on one process."""

    message: str
    is_user_error: bool


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those that work together."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_run(cls) -> "Ranks":
        """Those that torch.distributed has been started with."""
        return cls(rank=torch.distributed.get_rank(), size=torch.distributed.get_world_size())

    @property
    def is_main(self) -> bool:
        """Whether this process makes the folder, the index and the metadata."""
        return self.rank == 0

    def share(self, sizes: Sequence[int]) -> range:
        """Which of a row of jobs, of so many bytes each, are this process's.

        A run of neighbours, so that files are read from one end to the other, about as many bytes
        for each process, none left out and none given twice.
        """
        total = max(sum(sizes), 1)
        ends = list(itertools.accumulate(sizes, initial=0))
        # A job belongs where its middle falls; the middles grow, so each process gets neighbours.
        owners = [
            min((start + end) * self.size // (2 * total), self.size - 1)
            for start, end in itertools.pairwise(ends)
        ]
        own = [index for index, owner in enumerate(owners) if owner == self.rank]
        return range(own[0], own[-1] + 1) if own else range(0)

    def agree[T](self, action: Callable[[], T]) -> T:
        """Do something on every process, which all call it; what it returned here.

        Raises:
            CheckpointError: on all of them, if it failed on one with nothing but CheckpointErrors.
            OSError: on all of them, if it failed in another way.
        """
        if self.size == 1:
            return action()
        result, failure = None, None
        try:
            result = action()
        except FAILURES as error:
            failure = _Failure(
                message=cause_of(error), is_user_error=isinstance(error, CheckpointError)
            )
        failures = {
            rank: each for rank, each in enumerate(self.gather(failure)) if each is not None
        }
        if failures:
            # Often all of them have met the same.
            first = {each.message: rank for rank, each in reversed(failures.items())}
            message = "; ".join(f"rank {rank}: {each}" for each, rank in reversed(first.items()))
            raise (
                CheckpointError(message)
                if all(each.is_user_error for each in failures.values())
                else OSError(message)
            )
        return result  # type: ignore[return-value]

    def gather[T](self, value: T) -> list[T]:
        """A value of every process, by rank; called by all of them."""
        values = [value] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def on_main(self, action: Callable[[], object]) -> None:
        """Do something with files on the main process; all others wait, and fail if it does."""
        self.agree(action if self.is_main else lambda: None)


@contextmanager
def launched() -> Iterator[Ranks]:
    """The processes that torchrun started, or this one alone.

    Groups that a caller had started before are used and left running.
    """
    if torch.distributed.is_initialized():
        yield Ranks.of_run()
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
    yield Ranks(rank=torch.distributed.get_rank(), size=size)
    # Not after an error: the process ends anyway.
    torch.distributed.destroy_process_group()
