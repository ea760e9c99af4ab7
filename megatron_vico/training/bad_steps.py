"""Steps whose loss or gradient is no number or far above those before: found before the update."""

import json
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_vico.checkpoint.ranks import Ranks
from megatron_vico.config.schema import TrainingOptions
from megatron_vico.errors import TrainingError
from megatron_vico.parallel.batch import StepBatch
from megatron_vico.training.metrics import StepSums

WINDOW, FEWEST = 100, 20
"""Good steps that a step is compared with, and how many there must be."""

MOST_BAD = 10
"""Bad steps in a row, or returns to one checkpoint, after which leaving data out is no way on."""

_SHOWN_KEYS = 16


class GuardedOptimizer(ChainedOptimizer):
    """Leaves out the update, but not the norm, of a step that was judged to be bad."""

    is_bad = False
    loss: float | None = None
    watch: "StepWatch | None" = None

    def step_with_ready_grads(self) -> bool:
        """Step, unless the gradients must not reach the weights."""
        return not self.is_bad and super().step_with_ready_grads()

    def get_grad_norm(self) -> Any:
        """As megatron-core's; it is asked for before the gradients are clipped and used."""
        norm = super().get_grad_norm()
        if self.watch is not None:
            self.is_bad = self.watch.judge(float(norm or 0.0)) is not None
        return norm


class StepWatch:
    """Loss and gradient norm of the last good steps; the same on every rank."""

    def __init__(self, options: TrainingOptions, recent: Sequence[Sequence[float]] = ()) -> None:
        """Args: recent: `state` of the checkpoint that the run goes on from."""
        self._factor = options.bad_step_factor
        self.rewind(recent)
        self._loss = 0.0
        self.problem: str | None = None
        """What is wrong with the step that was judged last."""

        self.bad_in_a_row = self.rollbacks = 0
        self.without_gradient = 0
        """Steps in a row whose gradient was exactly 0."""

    def begin(self, sums: StepSums) -> None:
        """Learn the step's loss, over all ranks, before its gradient norm; every rank calls it."""
        loss = sums.loss.detach().double().clone()
        torch.distributed.all_reduce(loss)
        self._loss, self.problem = float(loss), None

    def judge(self, grad_norm: float) -> str | None:
        """Why the step must not be taken; None, and the step is remembered, where it may be."""
        self.problem = self._found(grad_norm)
        if self.problem is not None:
            self.bad_in_a_row += 1
            return self.problem
        self.bad_in_a_row = 0
        self.without_gradient = 0 if grad_norm else self.without_gradient + 1
        self._recent.append((self._loss, grad_norm))
        return None

    def _found(self, grad_norm: float) -> str | None:
        found = f"loss {self._loss:.6g}, gradient norm {grad_norm:.6g}"
        if not (math.isfinite(self._loss) and math.isfinite(grad_norm)):
            return found
        if len(self._recent) < FEWEST or not self._factor:
            return None
        usual = [median(values) for values in zip(*self._recent, strict=True)]
        if any(
            value > self._factor * before > 0
            for value, before in zip((self._loss, grad_norm), usual, strict=True)
        ):
            return (
                f"{found}, more than {self._factor:g} times the usual"
                f" {usual[0]:.6g}, {usual[1]:.6g} (--bad-step-factor)"
            )
        return None

    def rewind(self, recent: Sequence[Sequence[float]]) -> None:
        """Take up the `state` of a checkpoint; bad steps in a row still count."""
        self._recent = deque([tuple(each) for each in recent], maxlen=WINDOW)

    def state(self) -> list[list[float]]:
        """For a checkpoint."""
        return [list(each) for each in self._recent]


def keys_of(batch: StepBatch, *, reads: bool) -> list[str]:
    """Keys of a step's samples, of all replicas, whose first ranks read; called by every rank."""
    own = [key for pack in batch.packs for key in pack.keys] if reads else []
    return sorted({key for keys in Ranks.of_run().gather(own) for key in keys})


def told(iteration: int, problem: str, keys: Sequence[str], *, save: str | None) -> str:
    """A clause about a bad step; `save` has all keys, in bad_steps.jsonl."""
    shown = ", ".join(map(repr, keys[:_SHOWN_KEYS]))
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    where = f" (all in {Path(save) / 'bad_steps.jsonl'})" if more and save is not None else ""
    return f"iteration {iteration}: {problem}; its samples: {shown}{more}{where}"


def note_bad_step(save: Path, *, iteration: int, problem: str, action: str, keys: Any) -> None:
    """Add a line to <save>/bad_steps.jsonl."""
    row = {"iteration": iteration, "problem": problem, "action": action, "keys": keys}
    with (save / "bad_steps.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def refuse_learning_nothing(watch: StepWatch, *, steps: int, last: bool) -> None:
    """TrainingError where the gradient was exactly 0 in each of the first, or all, steps."""
    if watch.without_gradient >= FEWEST or (last and watch.without_gradient >= steps > 0):
        raise TrainingError(
            f"the gradient was exactly 0 in the last {watch.without_gradient} steps: nothing was"
            " learned. Do the samples have images and answers, and does the reference differ"
            " from the policy?"
        )


def refuse_hopeless(watch: StepWatch) -> None:
    """TrainingError after so many bad steps in a row that leaving them out is no way on."""
    found = max(watch.bad_in_a_row, watch.rollbacks)
    if found >= MOST_BAD:
        raise TrainingError(
            f"{found} bad steps {'in a row' if watch.rollbacks < found else 'since a checkpoint'},"
            f" the last with {watch.problem}; no data is to blame for that: lower --lr, or start"
            " from an earlier checkpoint."
        )
