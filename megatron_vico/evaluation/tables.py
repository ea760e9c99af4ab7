"""The ablation table (Table 3 of the ViCO paper): as JSON, as text for a terminal, as Markdown."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_vico.files import write_json


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


TITLES = {
    "vanilla": "Vanilla",
    "vanilla_vir": "Vanilla + ViR",
    "all_compress": "ViCO (all compressed)",
    "random_compress": "ViCO (random)",
    "image_level": "ViCO (image-level ViR)",
    "vico": "ViCO",
}
_HEADINGS = ("", "score", "retention", "compressed tiles", "visual tokens saved")


def write_results(rows: Sequence[TableRow], path: Path) -> None:
    """Write the rows, in printing order, as a JSON list; the file's folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, [asdict(row) for row in rows], sort_keys=False)


def read_results(path: Path) -> list[TableRow]:
    """The rows that `write_results` wrote."""
    return [TableRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def as_text(rows: Sequence[TableRow]) -> str:
    """The table for a terminal, numbers in per cent."""
    cells = [_HEADINGS, *(_cells(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEADINGS))]
    lines = []
    for title, *numbers in cells:
        padded = (text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True))
        lines.append("  ".join((title.ljust(widths[0]), *padded)))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_markdown(rows: Sequence[TableRow]) -> str:
    """The table for a README, numbers in per cent."""
    lines = [_HEADINGS, ("---", *["---:"] * (len(_HEADINGS) - 1)), *(_cells(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(row: TableRow) -> tuple[str, ...]:
    shares = (row.score, row.retention, row.compressed_tiles, row.visual_token_reduction)
    return (TITLES.get(row.row, row.row), *(f"{100 * share:.1f} %" for share in shares))
