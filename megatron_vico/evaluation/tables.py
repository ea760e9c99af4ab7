"""Tables: as text for a terminal, as Markdown, as LaTeX; the ablation table of one own set."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_vico.evaluation.benchmarks import ABLATIONS
from megatron_vico.files import read_json_value, record_of, write_json


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Cells of text; the first column is the widest and names the line."""

    headings: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    """Lines below the table."""


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One row of the table; all fractions in [0, 1]."""

    row: str
    score: float
    """Mean score over all questions."""

    retention: float
    """`score` over the vanilla row's."""

    compressed_tiles: float
    """Compressed tiles over all tiles of the set."""

    visual_token_reduction: float
    """1 - visual tokens seen by the language model / without compression, both counted."""


_HEADINGS = ("", "score", "retention", "compressed tiles", "visual tokens saved")
_LATEX = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "+-": r"$\pm$"}


def write_results(rows: Sequence[TableRow], path: Path) -> None:
    """Write the rows, in printing order, as a JSON list; the file's folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [asdict(row) for row in rows], sort_keys=False)


def read_results(path: Path) -> list[TableRow]:
    """The rows that `write_results` wrote."""
    return [record_of(TableRow, row) for row in read_json_value(path)]


def ablation_grid(rows: Sequence[TableRow]) -> Grid:
    """The table of an own set of questions, numbers in per cent."""
    return Grid(headings=_HEADINGS, lines=tuple(_cells(row) for row in rows))


def as_text(grid: Grid) -> str:
    """The table for a terminal."""
    cells = [grid.headings, *grid.lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for title, *numbers in cells:
        padded = (text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True))
        lines.append("  ".join((title.ljust(widths[0]), *padded)))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *grid.notes])


def as_markdown(grid: Grid) -> str:
    """The table for a page."""
    rule = ("---", *["---:"] * (len(grid.headings) - 1))
    lines = ["| " + " | ".join(line) + " |" for line in (grid.headings, rule, *grid.lines)]
    return "\n".join([*lines, *(f"\n{note}" for note in grid.notes)])


def as_latex(grid: Grid) -> str:
    """The table for a paper; needs the package booktabs."""
    head, *lines = (
        " & ".join(map(_escaped, line)) + r" \\" for line in (grid.headings, *grid.lines)
    )
    columns = "l" + "r" * (len(grid.headings) - 1)
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *lines]
    return "\n".join(
        [*body, r"\bottomrule", r"\end{tabular}", *(f"% {note}" for note in grid.notes)]
    )


def _escaped(text: str) -> str:
    for plain, latex in _LATEX.items():
        text = text.replace(plain, latex)
    return text


def _cells(row: TableRow) -> tuple[str, ...]:
    shares = (row.score, row.retention, row.compressed_tiles, row.visual_token_reduction)
    return (ABLATIONS.get(row.row, row.row), *(f"{100 * share:.1f} %" for share in shares))
