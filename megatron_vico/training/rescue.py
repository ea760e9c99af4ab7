"""An error that ends a run leaves a checkpoint of its last whole step, where there can be one."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from megatron_vico.data.load.error_budget import SkipList
from megatron_vico.data.pack.plan_state import PlanState
from megatron_vico.errors import cause_of
from megatron_vico.training.setup import Run

PATIENCE = timedelta(seconds=10)
"""What a failing rank waits for the others to fail at the same step: a checkpoint takes all."""


@dataclass(kw_only=True)
class Progress:
    """How far a run is, as a checkpoint would say it."""

    run: Run
    iteration: int
    """Steps that were done whole."""

    saved: Path | None
    """The newest checkpoint; None before the first."""

    tried: int
    """The step of which a checkpoint was last written, or could not be."""

    is_sound: bool = True
    """Whether weights and optimizer are those after `iteration`."""

    _place: tuple[PlanState, SkipList] | None = field(init=False)
    _window: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.step_done(self.iteration)

    @classmethod
    def of(cls, run: Run) -> "Progress":
        """A run before its first step."""
        at = run.iteration
        return cls(run=run, iteration=at, saved=run.resumed_from, tried=at)

    def step_done(self, iteration: int) -> None:
        """All of a step is done and its loss is a number: what is there now may be saved."""
        self.iteration, self.is_sound = iteration, True
        self._place = self.run.data.place()
        self._window = self.run.window.state()

    def restore(self) -> None:
        """Forget what a step that was not done whole has taken: its packs and its ratios."""
        self.run.data.go_on(self._place)
        self.run.window.load(self._window)


@contextlib.contextmanager
def saved_on_error(progress: Progress, save: Callable[[], None]) -> Iterator[None]:
    """Save, on every rank, before an error goes on its way, if all failed at the same step."""
    try:
        yield
    except Exception:
        if progress.is_sound and progress.iteration > progress.tried:

            def say(text: str) -> None:
                if progress.run.groups.is_main:
                    print(text, flush=True)

            if not _all_failed(progress.iteration):
                say("note: no checkpoint is saved: other ranks have not failed at this step")
                raise
            progress.restore()
            try:
                save()
                if progress.saved is not None and progress.tried == progress.iteration:
                    say(f"note: {progress.saved} is saved before the run ends with an error")
            except Exception as error:  # the one that ends the run is the one to show
                say(f"warning: no checkpoint could be saved: {cause_of(error)}")
        raise


def _all_failed(iteration: int) -> bool:
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    if size == 1:
        return True
    # Not by a collective: the others may be in one, which would take it for its own.
    store = torch.distributed.distributed_c10d._get_default_store()
    keys = [f"vico failed after step {iteration} on {each}" for each in range(size)]
    try:
        store.set(keys[rank], "")
        store.wait(keys, PATIENCE)
    except RuntimeError:  # some have not, or the store has gone with its rank
        return False
    return True
