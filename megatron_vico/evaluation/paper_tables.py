"""Tables 1, 2, 3, 5 and 6 of the ViCO paper from harness results and the server's request logs.

Retention is the paper's: the sum of a row's scores, each divided by its full scale (MME's is
2,800), over that of its base. Its standard error takes the two for independent; they answer the
same questions, so that the true one is smaller.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_vico.errors import ConfigError
from megatron_vico.evaluation.benchmarks import Benchmark
from megatron_vico.evaluation.harness import Harness, Result
from megatron_vico.evaluation.request_log import Compression, Request, RequestLogs, compression_of
from megatron_vico.evaluation.tables import Grid


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One score, and what the model saw for it."""

    score: float
    standard_error: float
    compression: Compression | None = None
    """None for scores without a log: those of the paper."""

    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model under one plan."""

    title: str
    model: str
    cells: Mapping[str, Cell]
    """By the benchmark's title; those that were run."""

    base: "Row | None" = None
    """What it is compared with; None for a base."""


def measured_row(
    title: str,
    model: str,
    *,
    benchmarks: Sequence[Benchmark],
    harness: Harness,
    logs: RequestLogs,
    base: Row | None,
) -> Row:
    """A row of results, each with its requests.

    Raises:
        ConfigError: if there is no result at all, a result's samples are not those of its requests,
            or a sample was scored without an answer.
    """
    cells = {}
    for benchmark in benchmarks:
        result = harness.result(model, benchmark)
        if result is not None:
            compression = compression_of(requests_of(result, logs))
            cells[benchmark.title] = Cell(
                score=result.score,
                standard_error=result.standard_error,
                compression=compression,
                source=str(result.source),
            )
    if not cells:
        folders = ", ".join(map(str, harness.folders))
        raise ConfigError(
            f"{model}: no result of this table in {folders}; there are results of"
            f" {', '.join(harness.models) or 'no model'}."
        )
    return Row(title=title, model=model, cells=cells, base=base)


def requests_of(result: Result, logs: RequestLogs) -> list[Request]:
    """The requests behind a result.

    By their ids where the client sent TASK/SPLIT/DOC_ID (our lmms-eval model does), by the run's
    time for VLMEvalKit, else all of the model's.

    Raises:
        ConfigError: naming the result and the logs, if they do not agree.
    """
    where = f"{', '.join(map(str, logs.paths))}"
    if result.num_failed:
        raise ConfigError(
            f"{result}: {result.num_failed} of {result.num_samples} samples were scored without an"
            f" answer; see their errors in {where}, and run them again (lmms-eval: without its"
            " cache)."
        )
    requests = logs.named(result.model, result.tasks)
    by_id = bool(requests)
    if not by_id and result.windows:
        requests = logs.between(result.model, result.windows)
    elif not by_id:
        requests = logs.all_of(result.model)
    if not requests:
        raise ConfigError(
            f"{result}: no answered request of it in {where}, which has requests for"
            f" {', '.join(logs.models) or 'no model'}; give the --log of the server that it asked."
        )
    if by_id and result.ids != {each.id for each in requests}:
        logged = {each.id for each in requests}
        odd = sorted(result.ids ^ logged)
        raise ConfigError(
            f"{result} has {len(result.ids)} samples, {where} has {len(logged)} of its tasks, and"
            f" {len(odd)} are only in one of them, such as {odd[0]}; give the log of this run."
        )
    if len(requests) != result.num_samples:
        raise ConfigError(
            f"{result} has {result.num_samples} samples, but {where} has {len(requests)} answered"
            " requests for it; give the log of this run, and of no other benchmark."
        )
    tokens = tuple(sorted(each.prompt_tokens for each in requests))
    if result.prompt_tokens and tokens != result.prompt_tokens:
        raise ConfigError(
            f"{result} was told of {sum(result.prompt_tokens)} prompt tokens, but {where} has"
            f" {sum(tokens)} in as many requests; give the log of this run."
        )
    return requests


@dataclass(frozen=True, kw_only=True)
class Retention:
    """A row against its base; fractions."""

    value: float
    standard_error: float
    benchmarks: tuple[str, ...]
    """Those that both have."""


def retention(row: Row, benchmarks: Sequence[Benchmark]) -> Retention:
    """The paper's overall score, over the benchmarks that row and base both have."""
    base = row.base or row
    common = [each for each in benchmarks if each.title in row.cells and each.title in base.cells]
    sums, errors = [], []
    for one in (row, base):
        cells = [(one.cells[each.title], each.full) for each in common]
        sums.append(sum(cell.score / full for cell, full in cells))
        errors.append(math.hypot(*(cell.standard_error / full for cell, full in cells)))
    if not sums[1]:
        raise ConfigError(f"{row.title}: its base {base.title} has no score above 0.")
    value = sums[0] / sums[1]
    error = math.hypot(errors[0], value * errors[1]) / sums[1] if row.base else 0.0
    names = tuple(each.title for each in common)
    return Retention(value=value, standard_error=error, benchmarks=names)


def grid(rows: Sequence[Row], benchmarks: Sequence[Benchmark], *, errors: bool = True) -> Grid:
    """The table as printed; per cent but for MME, scores with their standard errors."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        kept = retention(row, benchmarks)
        scores = [_score(row.cells.get(each.title), each, errors) for each in benchmarks]
        average = f"{100 * kept.value:.1f}%"
        if errors and row.base:
            average += f" +- {100 * kept.standard_error:.1f}"
        partial = len(kept.benchmarks) < len(benchmarks)
        lines.append((row.title, *scores, average + ("*" if partial else "")))
        lines.extend(_compression_lines(row, benchmarks))
    headings = ("Model", *(each.title for each in benchmarks), "Avg.")
    return Grid(headings=headings, lines=tuple(lines), notes=tuple(_notes(rows, benchmarks)))


def _score(cell: Cell | None, benchmark: Benchmark, errors: bool) -> str:
    if cell is None:
        return "-"
    digits = 0 if benchmark.full > 100 else 1
    error = f" +- {cell.standard_error:.{digits}f}" if errors else ""
    return f"{cell.score:.{digits}f}{error}"


def _compression_lines(row: Row, benchmarks: Sequence[Benchmark]) -> Iterator[tuple[str, ...]]:
    """Ratio of compressed patches, as in the paper; visual tokens where tokens were dropped."""
    seen = {name: cell.compression for name, cell in row.cells.items() if cell.compression}
    ratios = {name: found.by_tile for name, found in seen.items() if found.tiles}
    if any(0 < ratio < 1 for ratio in ratios.values()):
        yield _shares("Ratio of Compressed Patches", ratios, benchmarks)
    pruned = any(found.plan.startswith(("fastv", "sparsevlm")) for found in seen.values())
    if pruned and row.base:
        yield _shares("Visual Tokens Kept", _tokens_kept(row), benchmarks)


def _tokens_kept(row: Row) -> dict[str, float]:
    """Visual tokens over those of the base, where both are known."""
    base = row.base.cells if row.base else {}
    return {
        name: cell.compression.visual_tokens / whole.compression.visual_tokens
        for name, cell in row.cells.items()
        if cell.compression and (whole := base.get(name)) and whole.compression
        if whole.compression.visual_tokens
    }


def _shares(
    title: str, shares: Mapping[str, float], benchmarks: Sequence[Benchmark]
) -> tuple[str, ...]:
    cells = [f"{100 * shares[b.title]:.0f}%" if b.title in shares else "-" for b in benchmarks]
    mean = sum(shares.values()) / len(shares) if shares else 0.0
    return (title, *cells, f"{100 * mean:.1f}%")


def _notes(rows: Sequence[Row], benchmarks: Sequence[Benchmark]) -> Iterator[str]:
    if any(len(retention(row, benchmarks).benchmarks) < len(benchmarks) for row in rows):
        yield "* over the benchmarks that the row and its base both have."
    ratios = {row.title: _mean_ratio(row) for row in rows}
    matched, wanted = ratios.get("ViCO (random)"), ratios.get("ViCO")
    if matched is not None and wanted is not None and abs(matched - wanted) > 0.01:
        yield (
            f"ViCO (random) compressed {matched:.1%} of the tiles, ViCO {wanted:.1%}: not matched."
        )
    kept = {row.title: fmean(found.values()) for row in rows if (found := _tokens_kept(row))}
    for title in ("FastV", "SparseVLM"):
        if {title, "ViCO"} <= kept.keys() and abs(kept[title] - kept["ViCO"]) > 0.01:
            yield (
                f"{title} kept {kept[title]:.1%} of the visual tokens, ViCO {kept['ViCO']:.1%}:"
                " not matched."
            )


def _mean_ratio(row: Row) -> float | None:
    found = [cell.compression.by_tile for cell in row.cells.values() if cell.compression]
    return sum(found) / len(found) if found else None


def as_json(rows: Sequence[Row], benchmarks: Sequence[Benchmark]) -> list[dict[str, object]]:
    """Everything that is known of each row, for a file."""
    return [
        {
            "title": row.title,
            "model": row.model,
            "base": row.base.model if row.base else None,
            "retention": (kept := retention(row, benchmarks)).value,
            "retention_standard_error": kept.standard_error,
            "retention_over": kept.benchmarks,
            "scores": {name: _cell_json(cell) for name, cell in row.cells.items()},
        }
        for row in rows
    ]


def _cell_json(cell: Cell) -> dict[str, object]:
    seen = cell.compression
    own = {"score": cell.score, "standard_error": cell.standard_error, "source": cell.source}
    if seen is None:
        return dict(own)
    return own | {
        "plan": seen.plan,
        "samples": seen.num_requests,
        "tiles": seen.tiles,
        "compressed_tiles": seen.compressed_tiles,
        "compressed_by_tile": seen.by_tile,
        "compressed_by_image": seen.by_image,
        "visual_tokens": seen.visual_tokens,
    }
