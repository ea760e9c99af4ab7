"""The one place that logs: Megatron's log line, metrics.jsonl, TensorBoard and wandb.

A figure has the same name everywhere; in the log line its words.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vico.config.flags import to_yaml
from megatron_vico.config.schema import RunConfig
from megatron_vico.data.load.error_budget import ErrorBudget
from megatron_vico.data.samples import PackedBatch
from megatron_vico.errors import cause_of
from megatron_vico.files import read_json_lines, write_text
from megatron_vico.training.metrics import SHARES, StepFigures, ValidationFigures
from megatron_vico.training.step_clock import PHASES

LINE = {
    "compressed_tiles": ".1%",
    "tokens_per_s": ".0f",
    "tokens_per_s_per_gpu": ".1f",
    "mfu": ".1%",
    "memory_allocated_gb": ".1f",
    "memory_reserved_gb": ".1f",
    **{f"{phase}_s": ".3f" for phase in PHASES},
    "work_imbalance": ".3f",
    "fill": ".1%",
    **{f"kl_compressed_{share}": ".3E" for share in SHARES},
    "router_accuracy": ".1%",
    "router_auc": ".3f",
    "router_threshold": ".3E",
    "router_ratio_p10": ".3E",
    "router_ratio_p50": ".3E",
    "router_ratio_p90": ".3E",
}
"""What stands in the log line after Megatron's own words, and how."""


@dataclass(frozen=True, kw_only=True)
class _Output:
    """Where figures go besides the terminal."""

    log: Callable[[int, dict[str, Any]], object]
    """Takes a step and its figures by name."""

    close: Callable[[], object]


class MetricsLogger:
    """Writes the figures of steps and of the validation set, on the main rank only."""

    def __init__(
        self, cfg: RunConfig, *, resume_at: int, budget: ErrorBudget, is_main: bool
    ) -> None:
        """Open the files of --save; of `metrics.jsonl`, lines after step `resume_at` are dropped.

        Files get every step, the terminal one line in --log-interval. A file that cannot be written
        is told of and left out: no run ends for it. `budget` has the samples so far.
        """
        self.train_iters = cfg.training.train_iters
        self.log_interval = cfg.training.log_interval
        self.is_main = is_main
        self._consumed_samples, self._skipped_samples = budget.seen, budget.skipped
        self._window: list[StepFigures] = []
        self._outputs: dict[str, _Output] = {}
        self._failed: set[str] = set()
        if not is_main or cfg.checkpoint.save is None:
            return
        save = Path(cfg.checkpoint.save)
        board = cfg.checkpoint.tensorboard_dir or str(save / "tensorboard")
        self._path = save / "metrics.jsonl"
        self._open("metrics.jsonl", lambda: self._open_lines(self._path, resume_at))
        self._open("TensorBoard", lambda: _open_tensorboard(board, resume_at))
        if cfg.checkpoint.wandb_project is not None:
            self._open("wandb", lambda: _open_wandb(cfg, save))
        self._try("config.yaml", lambda: write_text(save / "config.yaml", to_yaml(cfg)))

    def _open(self, name: str, opener: Callable[[], _Output]) -> None:
        def keep() -> None:
            self._outputs[name] = opener()

        self._try(name, keep)

    def _try(self, name: str, action: Callable[[], object]) -> None:
        """Do something for an output; its first failure is told, none ends the run."""
        try:
            action()
        except Exception as error:  # TensorBoard's and wandb's own kinds too
            if name not in self._failed:
                self._failed.add(name)
                self.note(f"warning: {name} cannot be written: {cause_of(error)}; the run goes on")

    def _open_lines(self, path: Path, resume_at: int) -> _Output:
        rows = self._kept_rows(path, resume_at)
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        torn = ""

        def log(step: int, shown: dict[str, Any]) -> None:
            nonlocal torn
            text, torn = torn + json.dumps({"iteration": step, **shown}) + "\n", "\n"
            with path.open("a") as file:
                file.write(text)
            torn = ""  # else the next line would go on from half of this one

        return _Output(log=log, close=lambda: None)

    def rewind(self, iteration: int) -> None:
        """Drop the lines that were written after a step, to which the run goes back."""
        self._window.clear()
        if "metrics.jsonl" in self._outputs:
            self._open("metrics.jsonl", lambda: self._open_lines(self._path, iteration))

    def _kept_rows(self, path: Path, resume_at: int) -> list[dict[str, Any]]:
        if not path.exists() or resume_at == 0:
            return []
        rows, damaged = read_json_lines(path)
        if damaged:
            self.note(f"{path}: line {', '.join(map(str, damaged))} is damaged and is dropped")
        rows = [row for row in rows if isinstance(row.get("iteration"), int)]
        return [row for row in rows if row["iteration"] <= resume_at]

    def log(self, figures: StepFigures | ValidationFigures) -> None:
        """Record figures; a step is printed every `log_interval`, with the mean of those since."""
        if not self.is_main:
            return
        step, prefix = figures.iteration, figures.prefix
        shown = {
            prefix + name: value
            for name, value in vars(figures).items()
            if value is not None and name != "iteration"
        }
        for name, output in self._outputs.items():
            self._try(name, partial(output.log, step, shown))
        if isinstance(figures, ValidationFigures):
            parts = [f"{name.replace('_', ' ')}: {value:.6G}" for name, value in shown.items()]
            print(f"validation at step {step}: {' | '.join(parts)}", flush=True)
            return
        self._consumed_samples += figures.samples
        self._skipped_samples += figures.skipped
        self._window.append(figures)
        if step % self.log_interval == 0 or step == self.train_iters:
            print(" | ".join(self._line()) + " |", flush=True)
            self._window.clear()

    def note(self, text: str) -> None:
        """Print a line about the run."""
        if self.is_main:
            print(text, flush=True)

    def close(self) -> None:
        """Write what is still held back."""
        for name, output in self._outputs.items():
            self._try(name, output.close)

    def _line(self) -> Iterator[str]:
        last = self._window[-1]
        step_s = self._mean("step_time_s") or 0.0
        left_s = (self.train_iters - last.iteration) * step_s
        yield (
            f" [{datetime.now():%Y-%m-%d %H:%M:%S}] iteration"
            f" {last.iteration:8d}/{self.train_iters:8d}"
        )
        yield f"consumed samples: {self._consumed_samples:12d}"
        yield f"elapsed time per iteration (ms): {1000 * step_s:.1f}"
        if (tflops := self._mean("tflops_per_gpu")) is not None:
            yield f"throughput per GPU (TFLOP/s/GPU): {tflops:.1f}"
        yield f"learning rate: {last.learning_rate:.6E}"
        yield f"loss: {self._mean('loss'):.6E}"
        yield f"grad norm: {last.grad_norm:.3f}"
        for name, form in LINE.items():
            if (value := self._mean(name)) is not None:
                yield f"{name.replace('_', ' ')}: {value:{form}}"
        if self._skipped_samples:
            yield f"skipped samples: {self._skipped_samples}"
        yield f"time left: {time.strftime('%H:%M:%S', time.gmtime(left_s))}"

    def _mean(self, name: str) -> float | None:
        """Over the steps since the last line that have the figure."""
        values = [value for step in self._window if (value := getattr(step, name)) is not None]
        return sum(values) / len(values) if values else None


def _open_tensorboard(folder: str, resume_at: int) -> _Output:
    # 2 s of imports that only the main rank needs.
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder, purge_step=resume_at + 1)

    def log(step: int, shown: dict[str, Any]) -> None:
        for name, value in shown.items():
            writer.add_scalar(name, value, step)

    return _Output(log=log, close=writer.close)


def _open_wandb(cfg: RunConfig, save: Path) -> _Output:
    """A run of wandb that goes on where the folder's last one ended; WANDB_MODE=offline works."""
    import wandb

    identity = save / "wandb_run.txt"
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex[:12])
    run = wandb.init(
        project=cfg.checkpoint.wandb_project,
        name=os.environ.get("WANDB_NAME", save.name),
        id=identity.read_text(),
        resume="allow",
        dir=str(save),
        config=asdict(cfg),
    )
    return _Output(log=lambda step, shown: run.log(shown, step=step), close=run.finish)


def log_skipped(packs: Sequence[PackedBatch]) -> None:
    """Name the broken samples of a step that were not known before; on the rank that read them."""
    for skipped in (each for pack in packs for each in pack.skipped):
        print(f"skipped sample {skipped.key!r}: {skipped.cause}: {skipped.reason}", flush=True)
