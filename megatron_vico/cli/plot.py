"""`vico plot loss | trace | table`: loss curves, a step's trace, the ablation table."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_vico.errors import ConfigError


def main(arguments: Sequence[str]) -> None:
    """Draw or print; ConfigError if a file is not there or not what it should be."""
    parser = argparse.ArgumentParser(prog="vico plot", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    what = "one panel a run: every step in light, a running mean in dark, validation as points"
    loss = actions.add_parser("loss", help=what)
    runs_help = "a run's --save folder, or its metrics.jsonl"
    loss.add_argument("runs", nargs="+", metavar="TITLE=FOLDER", help=runs_help)
    trace = actions.add_parser("trace", help="who did what when in one step: a row a rank")
    folder_help = "what --profile wrote: <save>/trace/step_N; its last step is drawn"
    trace.add_argument("folder", type=Path, help=folder_help)
    trace.add_argument("--title", default="", help="line above the picture")
    for action in (loss, trace):
        output_help = "picture to write; its ending says the format"
        action.add_argument("--output", type=Path, required=True, help=output_help)
    table = actions.add_parser("table", help="print a results.json")
    table.add_argument("results", type=Path)
    table.add_argument("--format", choices=("text", "markdown"), default="text")
    options = parser.parse_args(arguments)
    if options.action == "table":
        _table(options.results, markdown=options.format == "markdown")
        return
    if options.action == "trace":
        _trace(options.folder, options.output, title=options.title)
        return
    from megatron_vico.evaluation.plots import loss_curves

    files = dict(_metrics_file(word) for word in options.runs)
    loss_curves(files).savefig(options.output, dpi=110)
    print(options.output)


def _table(path: Path, *, markdown: bool) -> None:
    from megatron_vico.evaluation.tables import as_markdown, as_text, read_results

    try:
        rows = read_results(path)
    except OSError as error:
        message = f"{path}: {error.strerror}; give the results.json of an evaluation."
        raise ConfigError(message) from error
    except (json.JSONDecodeError, TypeError) as error:
        raise ConfigError(f"{path}: not a results.json ({error}).") from error
    print(as_markdown(rows) if markdown else as_text(rows))


def _trace(folder: Path, output: Path, *, title: str) -> None:
    from megatron_vico.evaluation.plots import read_trace, trace_picture

    boxes = read_trace(folder)
    if not boxes:
        raise ConfigError(
            f"{folder}: no rank_*.json; give <save>/trace/step_N of a run with --profile."
        )
    trace_picture(boxes, title=title).savefig(output, dpi=110)
    print(output)


def _metrics_file(word: str) -> tuple[str, Path]:
    title, equals, folder = word.rpartition("=")
    path = Path(folder)
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"{file}: no such file; give TITLE=FOLDER with the --save folder of a run."
        )
    return (title if equals else path.name or folder), file
