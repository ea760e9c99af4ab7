"""`vico table`: the paper's tables from harness results and the request logs of `vico serve`."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from megatron_vico.cli.command_line import read
from megatron_vico.errors import ConfigError, nearest
from megatron_vico.files import refuse_unwritable

if TYPE_CHECKING:
    from megatron_vico.evaluation.benchmarks import Benchmark
    from megatron_vico.evaluation.paper_tables import Row


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The paper's tables from harness results and the request logs of `vico serve`."""

    table: Positional[Literal["1", "2", "3", "5", "6", "own"]]
    """Number of the paper's table; own, of the --columns."""

    rows: Annotated[Positional[tuple[str, ...]], arg(metavar="TITLE=MODEL ...")]
    """In order, MODEL as the server was asked for it (internvl@vir). A title that begins with + is
    compared with the last one that does not; in Table 3 the titles are vanilla, vanilla_vir,
    vanilla_one_tile, fastv, fastv_default, sparsevlm, sparsevlm_default, all_compress,
    random_compress, image_level and vico."""

    results: tuple[Path, ...]
    """Folders of lmms-eval (--output_path, with --log_samples) or VLMEvalKit (--work-dir)."""

    log: tuple[Path, ...]
    """Files of `vico serve --request-log`, one or more."""

    columns: Annotated[tuple[str, ...], arg(metavar="TASK:METRIC ...")] = ()
    """Columns of an own table: a harness's name of a task, and its metric in [0, 1]."""

    format: Literal["text", "markdown", "latex", "json"] = "text"
    """How it is written."""

    errors: bool = True
    """Print standard errors beside the scores."""

    output: Path | None = None
    """File to write; unset, the terminal."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: if rows or columns are not what the table takes."""
        if not self.rows:
            raise ConfigError("no row; give TITLE=MODEL, such as InternVL3.5-8B=base@none.")
        if wrong := [row for row in self.rows if "=" not in row.strip("=")]:
            raise ConfigError(f"row {wrong[0]!r}: expected TITLE=MODEL.")
        if bool(self.columns) != (self.table == "own"):
            raise ConfigError("--columns TASK:METRIC ... and the table `own` go together.")
        if wrong := [column for column in self.columns if ":" not in column.strip(":")]:
            raise ConfigError(f"--columns {wrong[0]!r}: expected TASK:METRIC.")
        refuse_unwritable("--output", self.output)


def main(arguments: Sequence[str]) -> None:
    """Print or write the table.

    Raises:
        ConfigError: if a result has no log, or other samples than its log; both are named.
    """
    options = read(Flags, arguments, prog="vico table")
    import json

    from megatron_vico import files
    from megatron_vico.evaluation import tables
    from megatron_vico.evaluation.paper_tables import as_json, grid

    benchmarks = list(_own(options.columns)) or _paper(options.table)
    rows = list(_rows(options, benchmarks))
    if options.format == "json":
        text = json.dumps(as_json(rows, benchmarks), indent=2)
    else:
        write = {"text": tables.as_text, "markdown": tables.as_markdown, "latex": tables.as_latex}
        text = write[options.format](grid(rows, benchmarks, errors=options.errors))
    if options.output is None:
        print(text)
    else:
        files.write_text(options.output, text + "\n")


def _own(columns: Sequence[str]) -> Iterator["Benchmark"]:
    from megatron_vico.evaluation.benchmarks import Benchmark, Metric

    for column in columns:
        name, _, key = column.partition(":")
        metric = Metric(name=name, keys=(key,), scale=100.0)
        yield Benchmark(title=name, vlmevalkit=metric, lmms=metric)


def _paper(table: str) -> Sequence["Benchmark"]:
    from megatron_vico.evaluation.benchmarks import TABLES

    return TABLES[int(table)]


def _rows(options: Flags, benchmarks: Sequence["Benchmark"]) -> Iterator["Row"]:
    from megatron_vico.evaluation.benchmarks import ABLATIONS
    from megatron_vico.evaluation.harness import Harness
    from megatron_vico.evaluation.paper_tables import measured_row
    from megatron_vico.evaluation.request_log import RequestLogs

    harness, logs = Harness(folders=options.results), RequestLogs(options.log)
    named = [_title_and_model(row) for row in options.rows]
    if options.table == "3":
        if wrong := [title for title, _ in named if title not in ABLATIONS]:
            raise ConfigError(f"row {wrong[0]!r} of Table 3{nearest(wrong[0], ABLATIONS)}.")
        models = dict(named)
        if "vanilla" not in models:
            raise ConfigError("Table 3 without vanilla=MODEL, which all rows are compared with.")
        named = [(name, models[name]) for name in ABLATIONS if name in models]
    base: Row | None = None
    for title, model in named:
        is_base = base is None if options.table == "3" else not title.startswith("+")
        row = measured_row(
            ABLATIONS[title] if options.table == "3" else title,
            model,
            benchmarks=benchmarks,
            harness=harness,
            logs=logs,
            base=None if is_base else base,
        )
        base = row if is_base else base
        yield row


def _title_and_model(row: str) -> tuple[str, str]:
    """Both may hold `=`, as in random=0.5=internvl@random=0.5; a model has none before its @."""
    named = re.fullmatch(r"(.+?)=([^=@]+@.+)", row)
    title, _, model = row.partition("=")
    return (named[1], named[2]) if named else (title, model)
