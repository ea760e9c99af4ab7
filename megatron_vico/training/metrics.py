"""The one place that logs: a step's sums over all ranks, Megatron's log line with ViCO's figures,
TensorBoard, JSON."""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from megatron_vico.data.samples import PackedBatch
from megatron_vico.parallel.groups import Groups


@dataclass(frozen=True, kw_only=True)
class RouterSums:
    """What a router step counts on one rank, about its own tiles; float32 scalars that add up over
    ranks."""

    questions: Tensor
    labelled_compress: Tensor
    predicted_compress: Tensor
    correct: Tensor
    log_ratio: Tensor
    threshold: Tensor
    """tau of Eq. 3, divided by the number of ranks so that the sum is tau."""


@dataclass(frozen=True, kw_only=True)
class StepSums:
    """What a step counts on one rank; every number adds up over ranks."""

    loss: Tensor
    """This rank's share of the step's loss, a float32 scalar."""

    samples: int
    tiles: int
    compressed_tiles: int
    reference_tokens: int
    policy_tokens: int
    response_tokens: int
    skipped: int = 0
    """Broken samples among `samples` that were not known to be broken before."""

    router: RouterSums | None = None


def sums_of(
    packs: Sequence[PackedBatch], *, groups: Groups, loss: Tensor, router: RouterSums | None = None
) -> StepSums:
    """Count a replica's packs, on its first rank; the last policy view is the one whose compression
    is reported.

    Args:
        packs: the replica's packs of the step.
        groups: process groups.
        loss: this rank's share of the loss; tensor-parallel ranks have the same, of which one
            counts.
        router: figures of a router step.

    Returns:
        The rank's sums; all counts come from tensors on the CPU, so nothing waits for a device.
    """
    loss = loss.detach().float()
    if groups.replica.rank() != 0:
        packs = ()
    views = [pack.policies[-1] if pack.policies else None for pack in packs]
    return StepSums(
        loss=loss if groups.counts_loss or router is not None else torch.zeros_like(loss),
        samples=sum(len(pack.keys) for pack in packs),
        tiles=sum(pack.num_tiles for pack in packs),
        compressed_tiles=sum(int(view.compressed.sum()) for view in views if view is not None),
        reference_tokens=sum(len(pack.reference.token_ids) for pack in packs),
        policy_tokens=sum(
            len((pack.reference if view is None else view.stream).token_ids)
            for pack, view in zip(packs, views, strict=True)
        ),
        response_tokens=sum(len(pack.labels) for pack in packs),
        skipped=sum(len(pack.skipped) for pack in packs),
        router=router,
    )


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """One step over all ranks; what the log line, TensorBoard and the JSON line show."""

    iteration: int
    loss: float
    grad_norm: float
    learning_rate: float
    step_time_s: float
    samples: int
    tiles: int
    compressed_tiles: float
    """Fraction of tiles that the policy saw compressed."""

    visual_token_reduction: float
    """1 - policy tokens / reference tokens, text included."""

    policy_tokens: int
    response_tokens: int
    skipped: int = 0
    """Broken samples among `samples`, of which nothing is trained, but those known before; see
    data/load/error_budget.py."""

    router_threshold: float | None = None
    router_accuracy: float | None = None
    router_labelled_compress: float | None = None
    router_predicted_compress: float | None = None
    router_mean_log_ratio: float | None = None

    @classmethod
    def reduce(
        cls,
        sums: StepSums,
        *,
        iteration: int,
        grad_norm: float,
        learning_rate: float,
        step_time_s: float,
    ) -> Self:
        """Add the sums of all ranks, in one collective, and turn them into figures."""
        counts = [
            sums.samples,
            sums.tiles,
            sums.compressed_tiles,
            sums.reference_tokens,
            sums.policy_tokens,
        ]
        counts += [sums.response_tokens, sums.skipped]
        router = (
            []
            if sums.router is None
            else [getattr(sums.router, f.name) for f in dataclasses.fields(RouterSums)]
        )
        values = torch.stack(
            [
                sums.loss.double(),
                *(torch.tensor(float(count), device=sums.loss.device).double() for count in counts),
                *(value.to(sums.loss.device).double() for value in router),
            ]
        )
        torch.distributed.all_reduce(values)
        (
            loss,
            samples,
            tiles,
            compressed,
            reference_tokens,
            policy_tokens,
            responses,
            skipped,
            *rest,
        ) = values.tolist()
        return cls(
            iteration=iteration,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            step_time_s=step_time_s,
            samples=int(samples),
            tiles=int(tiles),
            compressed_tiles=compressed / max(tiles, 1),
            visual_token_reduction=1 - policy_tokens / max(reference_tokens, 1),
            policy_tokens=int(policy_tokens),
            response_tokens=int(responses),
            skipped=int(skipped),
            **_router_figures(rest),
        )


def _router_figures(values: list[float]) -> dict[str, Any]:
    if not values:
        return {}
    questions, labelled, predicted, correct, log_ratio, threshold = values
    asked = max(questions, 1)
    return {
        "router_threshold": threshold,
        "router_accuracy": correct / asked,
        "router_labelled_compress": labelled / asked,
        "router_predicted_compress": predicted / asked,
        "router_mean_log_ratio": log_ratio / asked,
    }


@dataclass(frozen=True, kw_only=True)
class ValidationFigures:
    """The validation set after one step, over all ranks; means over samples, NaN where none could
    be used."""

    iteration: int
    loss: float
    """Cross-entropy; KL of Eq. 1 at a share of tiles compressed; or the router's cross-entropy."""

    loss_all_compressed: float | None = None
    """KL of Eq. 1 with every tile compressed."""

    router_accuracy: float | None = None
    router_labelled_compress: float | None = None
    router_predicted_compress: float | None = None
    samples: int
    """Those with an answer; in the router stage, those with an image."""

    time_s: float


class MetricsLogger:
    """Writes each step's figures, on the main rank only."""

    def __init__(
        self,
        *,
        save: Path | None,
        tensorboard_dir: Path | None,
        train_iters: int,
        log_interval: int,
        resume_at: int,
        is_main: bool,
    ) -> None:
        """Open the files.

        Args:
            save: folder of `metrics.jsonl`; nothing is written where it is None.
            tensorboard_dir: folder of TensorBoard files; unset, `save`/tensorboard.
            train_iters: steps of the stage, for the log line.
            log_interval: steps between two log lines; files get every step.
            resume_at: steps already done; later lines of an interrupted run are dropped from
                `metrics.jsonl`.
            is_main: whether this rank writes.
        """
        self.train_iters = train_iters
        self.log_interval = log_interval
        self.is_main = is_main
        self._consumed_samples = self._skipped_samples = 0
        self._window: list[StepFigures] = []
        self._lines = self._tensorboard = None
        if not is_main or save is None:
            return
        save.mkdir(parents=True, exist_ok=True)
        path = save / "metrics.jsonl"
        kept = _lines_before(path, resume_at)
        self._consumed_samples = sum(json.loads(line).get("samples", 0) for line in kept)
        self._skipped_samples = sum(json.loads(line).get("skipped", 0) for line in kept)
        path.write_text("".join(kept))
        self._lines = path.open("a", buffering=1)
        from torch.utils.tensorboard import (
            SummaryWriter,
        )  # 2 s of imports that only the main rank needs

        self._tensorboard = SummaryWriter(
            str(tensorboard_dir or save / "tensorboard"), purge_step=resume_at + 1
        )

    def log(self, figures: StepFigures) -> None:
        """Record one step; prints every `log_interval` steps, with the mean of the steps since."""
        if not self.is_main:
            return
        self._consumed_samples += figures.samples
        self._skipped_samples += figures.skipped
        self._window.append(figures)
        shown = {
            name: value for name, value in dataclasses.asdict(figures).items() if value is not None
        }
        if self._lines is not None and self._tensorboard is not None:
            self._lines.write(json.dumps(shown) + "\n")
            for name, value in shown.items():
                if name != "iteration":
                    self._tensorboard.add_scalar(name, value, figures.iteration)
        if figures.iteration % self.log_interval == 0 or figures.iteration == self.train_iters:
            print(self._line(), flush=True)
            self._window.clear()

    def log_validation(self, figures: ValidationFigures) -> None:
        """Print and record the validation set; in `metrics.jsonl` a line of its own, whose keys
        begin with `valid_`."""
        if not self.is_main:
            return
        shown = {
            name: value for name, value in dataclasses.asdict(figures).items() if value is not None
        }
        step = shown.pop("iteration")
        if self._lines is not None and self._tensorboard is not None:
            line = {"iteration": step, **{f"valid_{name}": value for name, value in shown.items()}}
            self._lines.write(json.dumps(line) + "\n")
            for name, value in shown.items():
                self._tensorboard.add_scalar(f"valid/{name}", value, step)
        parts = [f"{name.replace('_', ' ')}: {value:.6G}" for name, value in shown.items()]
        print(f"validation at step {step}: {' | '.join(parts)}", flush=True)

    def close(self) -> None:
        """Flush and close the files."""
        if self._lines is not None and self._tensorboard is not None:
            self._lines.close()
            self._tensorboard.close()

    def _line(self) -> str:
        last, count = self._window[-1], len(self._window)
        seconds = sum(each.step_time_s for each in self._window)
        left_s = (self.train_iters - last.iteration) * seconds / count
        parts = [
            (
                f" [{datetime.now():%Y-%m-%d %H:%M:%S}] iteration"
                f" {last.iteration:8d}/{self.train_iters:8d}"
            ),
            f"consumed samples: {self._consumed_samples:12d}",
            f"elapsed time per iteration (ms): {1000 * seconds / count:.1f}",
            f"learning rate: {last.learning_rate:.6E}",
            f"loss: {sum(each.loss for each in self._window) / count:.6E}",
            f"grad norm: {last.grad_norm:.3f}",
            f"compressed tiles: {sum(each.compressed_tiles for each in self._window) / count:.1%}",
            f"samples/s: {sum(each.samples for each in self._window) / seconds:.0f}",
        ]
        if last.router_threshold is not None:
            accuracy = sum(each.router_accuracy or 0.0 for each in self._window) / count
            parts += [f"router accuracy: {accuracy:.1%}", f"tau: {last.router_threshold:.3E}"]
        if self._skipped_samples:
            parts.append(f"skipped samples: {self._skipped_samples}")
        parts.append(f"time left: {time.strftime('%H:%M:%S', time.gmtime(left_s))}")
        return " | ".join(parts) + " |"


def log_skipped(packs: Sequence[PackedBatch]) -> None:
    """Name the broken samples of a step that were not known before; on the rank that read them."""
    for skipped in (each for pack in packs for each in pack.skipped):
        print(f"skipped sample {skipped.key!r}: {skipped.cause}: {skipped.reason}", flush=True)


def _lines_before(path: Path, resume_at: int) -> list[str]:
    if not path.exists() or resume_at == 0:
        return []
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        # A run that was killed may leave half a line at the end.
        if line.endswith("\n") and json.loads(line)["iteration"] <= resume_at:
            kept.append(line)
    return kept


def check_finite(figures: StepFigures) -> None:
    """Stop a run whose loss or gradient is no number, before it is saved over a good checkpoint.

    Raises:
        FloatingPointError: naming the step and both values.
    """
    if not (math.isfinite(figures.loss) and math.isfinite(figures.grad_norm)):
        raise FloatingPointError(
            f"iteration {figures.iteration}: loss {figures.loss}, gradient norm"
            f" {figures.grad_norm}; lower --lr or look at the samples of this step; the last"
            " checkpoint is untouched"
        )
