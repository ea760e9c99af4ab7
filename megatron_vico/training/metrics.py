"""The one place that logs: sums over all ranks, Megatron's log line, TensorBoard, JSON."""

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from megatron_vico.config.schema import RunConfig
from megatron_vico.data.samples import PackedBatch
from megatron_vico.parallel.groups import Groups


@dataclass(frozen=True, kw_only=True)
class RouterSums:
    """What a router step counts on one rank, of its own tiles; float32 scalars that add up."""

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
    """This rank's part of the step's loss, a float32 scalar."""

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
    """Count a replica's packs, on its first rank.

    All counts come from tensors on the CPU, so nothing waits for a device. Of several policy views
    the compression of the last one is reported.
    """
    loss = loss.detach().float()
    if groups.replica.rank() != 0:
        packs = ()
    views = [pack.policies[-1] if pack.policies else None for pack in packs]
    return StepSums(
        # Tensor-parallel ranks have the same loss, of which one counts; ViR's is of own tiles.
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
    """One step over all ranks: what the log line, TensorBoard and the JSON line show."""

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
    """Broken samples among `samples` that were not known before (data/load/error_budget.py)."""

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
        counted = {
            field.name: getattr(sums, field.name)
            for field in dataclasses.fields(sums)
            if field.name != "router"
        }
        if sums.router is not None:
            counted |= vars(sums.router)
        device = sums.loss.device
        values = torch.stack(
            [
                torch.as_tensor(value, dtype=torch.float64, device=device)
                for value in counted.values()
            ]
        )
        torch.distributed.all_reduce(values)
        total = dict(zip(counted, values.tolist(), strict=True))
        return cls(
            iteration=iteration,
            loss=total["loss"],
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            step_time_s=step_time_s,
            samples=int(total["samples"]),
            tiles=int(total["tiles"]),
            compressed_tiles=total["compressed_tiles"] / max(total["tiles"], 1),
            visual_token_reduction=(1 - total["policy_tokens"] / max(total["reference_tokens"], 1)),
            policy_tokens=int(total["policy_tokens"]),
            response_tokens=int(total["response_tokens"]),
            skipped=int(total["skipped"]),
            **({} if sums.router is None else _router_figures(total)),
        )


def _router_figures(total: Mapping[str, float]) -> dict[str, float]:
    asked = max(total["questions"], 1)
    return {
        "router_threshold": total["threshold"],
        "router_accuracy": total["correct"] / asked,
        "router_labelled_compress": total["labelled_compress"] / asked,
        "router_predicted_compress": total["predicted_compress"] / asked,
        "router_mean_log_ratio": total["log_ratio"] / asked,
    }


@dataclass(frozen=True, kw_only=True)
class ValidationFigures:
    """The validation set after one step, over all ranks: means over samples, NaN without any."""

    iteration: int
    loss: float
    """Cross-entropy; KL of Eq. 1 with a part of the tiles compressed; or the router's loss."""

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

    def __init__(self, cfg: RunConfig, *, resume_at: int, is_main: bool) -> None:
        """Open the files of --save; of `metrics.jsonl`, lines after step `resume_at` are dropped.

        Files get every step, the terminal one line in --log-interval.
        """
        self.train_iters = cfg.training.train_iters
        self.log_interval = cfg.training.log_interval
        self.is_main = is_main
        self._consumed_samples = self._skipped_samples = 0
        self._window: list[StepFigures] = []
        self._lines = self._tensorboard = None
        if not is_main or cfg.checkpoint.save is None:
            return
        save = Path(cfg.checkpoint.save)
        save.mkdir(parents=True, exist_ok=True)
        path = save / "metrics.jsonl"
        kept = _lines_before(path, resume_at)
        self._consumed_samples = sum(json.loads(line).get("samples", 0) for line in kept)
        self._skipped_samples = sum(json.loads(line).get("skipped", 0) for line in kept)
        path.write_text("".join(kept))
        self._lines = path.open("a", buffering=1)
        # 2 s of imports that only the main rank needs.
        from torch.utils.tensorboard import SummaryWriter

        self._tensorboard = SummaryWriter(
            cfg.checkpoint.tensorboard_dir or str(save / "tensorboard"), purge_step=resume_at + 1
        )

    def log(self, figures: StepFigures) -> None:
        """Record one step; prints every `log_interval` steps, with the mean of the steps since."""
        if not self.is_main:
            return
        self._consumed_samples += figures.samples
        self._skipped_samples += figures.skipped
        self._window.append(figures)
        shown = _shown(figures)
        self._write(shown, figures.iteration, {"iteration": figures.iteration, **shown})
        if figures.iteration % self.log_interval == 0 or figures.iteration == self.train_iters:
            print(self._line(), flush=True)
            self._window.clear()

    def log_validation(self, figures: ValidationFigures) -> None:
        """Print and record the validation set; in `metrics.jsonl` a line with keys `valid_`..."""
        if not self.is_main:
            return
        shown, step = _shown(figures), figures.iteration
        line = {"iteration": step, **{f"valid_{name}": value for name, value in shown.items()}}
        self._write({f"valid/{name}": value for name, value in shown.items()}, step, line)
        parts = [f"{name.replace('_', ' ')}: {value:.6G}" for name, value in shown.items()]
        print(f"validation at step {step}: {' | '.join(parts)}", flush=True)

    def _write(self, scalars: Mapping[str, float], step: int, line: Mapping[str, float]) -> None:
        if self._lines is None or self._tensorboard is None:
            return
        self._lines.write(json.dumps(line) + "\n")
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)

    def note(self, text: str) -> None:
        """Print a line about the run."""
        if self.is_main:
            print(text, flush=True)

    def close(self) -> None:
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


def _shown(figures: StepFigures | ValidationFigures) -> dict[str, float]:
    return {
        name: value
        for name, value in vars(figures).items()
        if value is not None and name != "iteration"
    }


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
