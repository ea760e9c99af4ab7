"""A JSONL file cut into runs of lines, each the work of one process."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_vico.data.records import bounded_lines
from megatron_vico.files import open_plain


@dataclass(kw_only=True)
class LineRun:
    """Some lines of a JSONL file, one after the other."""

    number: int
    """Of the run in the file, from 0."""

    start: int
    """Byte that it starts at."""

    end: int
    """Byte after its last."""

    first_line: int
    """Number of its first line, from 1."""

    num_samples: int = 0
    """Lines that are not blank."""


@dataclass(frozen=True, kw_only=True)
class LinePlan:
    """A JSONL file cut into runs of equally many samples."""

    sha256: str
    runs: tuple[LineRun, ...]

    @property
    def num_samples(self) -> int:
        """Lines that are not blank."""
        return sum(run.num_samples for run in self.runs)


def cut_lines(path: Path, *, samples_per_run: int) -> LinePlan:
    """Cut a JSONL file into runs of so many lines that are not blank, parsing nothing."""
    digest, runs, end = hashlib.sha256(), list[LineRun](), 0
    with open_plain(path) as file:
        for number, (num_bytes, line) in enumerate(bounded_lines(file), start=1):
            if not runs or runs[-1].num_samples == samples_per_run:
                runs.append(LineRun(number=len(runs), start=end, end=end, first_line=number))
            digest.update(line)
            end += num_bytes
            runs[-1].end = end
            runs[-1].num_samples += bool(line.strip())
    whole = [run for run in runs if run.num_samples]  # not one of blank lines at the end
    return LinePlan(sha256=digest.hexdigest(), runs=tuple(whole))


def read_lines(path: Path, run: LineRun) -> Iterator[tuple[int, bytes]]:
    """(number from 1, content) of each line of a run that is not blank."""
    with open_plain(path) as file:
        file.seek(run.start)
        for number, (_, line) in enumerate(bounded_lines(file, end=run.end), run.first_line):
            if line.strip():
                yield number, line
