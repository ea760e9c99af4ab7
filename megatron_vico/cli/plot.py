"""`vico plot`: loss curves, a step's trace, an own table, and figures about a trained model."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from megatron_vico.cli.command_line import read_action
from megatron_vico.errors import ConfigError
from megatron_vico.files import (
    PICTURES,
    read_json,
    read_json_value,
    record_of,
    refuse_unwritable,
)


def main(arguments: Sequence[str]) -> None:
    """Draw or print; ConfigError if a file is not there or not what it should be."""
    actions = {
        "loss": Loss,
        "trace": Trace,
        "table": Table,
        "window": Window,
        "content": Content,
        "bubble": Bubbles,
    }
    read_action(actions, arguments, prog="vico plot", description=__doc__).run()


@dataclass(frozen=True, kw_only=True)
class _Picture:
    output: Path
    """Picture to write; its ending says the format."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: if it could not be written."""
        refuse_unwritable("--output", self.output, endings=PICTURES)


@dataclass(frozen=True, kw_only=True)
class Loss(_Picture):
    """One panel a run: every step in light, a running mean in dark, validation as points."""

    runs: Annotated[Positional[tuple[str, ...]], arg(metavar="TITLE=FOLDER ...")]
    """A run's --save folder, or its metrics.jsonl."""

    def run(self) -> None:
        """Draw the curves."""
        from megatron_vico.evaluation.plots import loss_curves

        if not self.runs:
            raise ConfigError("no run to draw; give TITLE=FOLDER with the --save folder of one.")
        files = dict(_metrics_file(word) for word in self.runs)
        loss_curves(files).savefig(self.output, dpi=110)
        print(self.output)


@dataclass(frozen=True, kw_only=True)
class Trace(_Picture):
    """Who did what when in one step: a row a rank."""

    folder: Positional[Path]
    """What --profile wrote: <save>/trace/step_N; its last step is drawn."""

    title: str = ""
    """Line above the picture."""

    def run(self) -> None:
        """Draw the step."""
        from megatron_vico.evaluation.plots import read_trace, trace_picture

        boxes = read_trace(self.folder)
        if not boxes:
            raise ConfigError(
                f"{self.folder}: no rank_*.json; give <save>/trace/step_N of a run with --profile."
            )
        trace_picture(boxes, title=self.title).savefig(self.output, dpi=110)
        print(self.output)


@dataclass(frozen=True, kw_only=True)
class Table:
    """Print a results.json."""

    results: Positional[Path]
    """What an evaluation wrote."""

    format: Literal["text", "markdown"] = "text"
    """For a terminal, or for a page."""

    def run(self) -> None:
        """Print the table."""
        from megatron_vico.evaluation import tables

        try:
            rows = tables.read_results(self.results)
        except TypeError as error:
            raise ConfigError(f"{self.results}: not a results.json ({error}).") from error
        write = tables.as_markdown if self.format == "markdown" else tables.as_text
        print(write(tables.ablation_grid(rows)))


@dataclass(frozen=True, kw_only=True)
class Window(_Picture):
    """Loss ratios in the window, and their threshold, over a router stage."""

    run_folder: Positional[Path]
    """The run's --save folder, or its metrics.jsonl."""

    def run(self) -> None:
        """Draw the curves."""
        from megatron_vico.evaluation.figures import ratio_window

        _, metrics = _metrics_file(str(self.run_folder))
        ratio_window(metrics).savefig(self.output, dpi=110)
        print(self.output)


@dataclass(frozen=True, kw_only=True)
class Content(_Picture):
    """Compressed tiles by kind of content."""

    result: Positional[Path]
    """What `vico evaluate --output` wrote."""

    def run(self) -> None:
        """Draw the bars."""
        from megatron_vico.evaluation.figures import compression_by_content
        from megatron_vico.evaluation.runner import RowResult

        written = read_json(self.result)
        names = [field.name for field in fields(RowResult)]
        try:
            result = record_of(RowResult, {name: written[name] for name in names})
        except (KeyError, TypeError) as error:
            message = f"{self.result}: no {error}; give what `vico evaluate --output` wrote."
            raise ConfigError(message) from error
        compression_by_content(result).savefig(self.output, dpi=110)
        print(self.output)


@dataclass(frozen=True, kw_only=True)
class Bubbles(_Picture):
    """Score against first-token throughput (Figure 1b of the paper)."""

    models: Positional[Path]
    """A JSON list; of each: name, group, score, throughput, parameters_b."""

    def run(self) -> None:
        """Draw the chart."""
        from megatron_vico.evaluation.figures import Bubble, bubble_chart

        try:
            bubbles = [record_of(Bubble, each) for each in read_json_value(self.models)]
        except TypeError as error:
            raise ConfigError(f"{self.models}: {error}; see `vico plot bubble --help`.") from error
        bubble_chart(bubbles).savefig(self.output, dpi=110)
        print(self.output)


def _metrics_file(word: str) -> tuple[str, Path]:
    title, equals, folder = word.rpartition("=")
    path = Path(folder)
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"{file}: no such file; give TITLE=FOLDER with the --save folder of a run."
        )
    return (title if equals else path.name or folder), file
