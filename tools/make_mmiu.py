#!/usr/bin/env python3
"""Makes MMIU a multiple-choice set of VLMEvalKit, which does not have it.

    python tools/make_mmiu.py --questions MMIU-Benchmark/all.json --images MMIU-Benchmark \\
        --output $LMUData/MMIU.tsv

`run.py --data MMIU` then reads it as a set of one's own (CustomMCQDataset of e8e78f0: index,
image_path, question, a column an option, answer, category). Questions are those of
huggingface.co/datasets/FanqingM/MMIU-Benchmark: task, question, options ("A: red\\nB: blue"),
output (a letter) and input_image_path (a list) each, as one JSON list or as JSONL.
"""

import csv
import json
import re
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vico import files
from megatron_vico.cli.command_line import read
from megatron_vico.errors import USER_ERRORS, SampleError

_OPTION = re.compile(r"^\(?([A-Z])[:.)]\s*(.*?)\s*(?=^\(?[A-Z][:.)]|\Z)", re.MULTILINE | re.DOTALL)
_BEFORE, _AFTER = ("index", "image_path", "question"), ("answer", "category")


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Make MMIU a multiple-choice set of VLMEvalKit."""

    questions: Path
    """The set's JSON or JSONL."""

    images: Path
    """Folder that its paths start from."""

    output: Path
    """TSV to write: $LMUData/MMIU.tsv."""


def main() -> int:
    """Convert; exit status 0, or 2 after an error of the user's."""
    options = read(Flags, sys.argv[1:], prog="make_mmiu.py")
    try:
        rows = [
            row_of(question, number, options.images)
            for number, question in enumerate(read_questions(options.questions))
        ]
    except USER_ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    letters = [each for each in string.ascii_uppercase if any(each in row for row in rows)]
    with files.replacing(options.output) as unfinished, unfinished.open("w", newline="") as file:
        columns = (*_BEFORE, *letters, *_AFTER)
        writer = csv.DictWriter(file, columns, restval="", dialect="excel-tab")
        writer.writeheader()
        writer.writerows(rows)
    tasks = len({row["category"] for row in rows})
    print(f"{options.output}: {len(rows)} questions of {tasks} tasks")
    return 0


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The questions of a JSON list, or of JSONL."""
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise SampleError(f"{path}: {error}; expected MMIU's questions as JSON.") from error


def row_of(question: dict[str, Any], number: int, images: Path) -> dict[str, str]:
    """A line of the TSV; SampleError if the answer is no option, or an image is missing."""
    where = f"question {number}"
    try:
        options = dict(_OPTION.findall(question["options"]))
        paths = [images / path for path in question["input_image_path"]]
        row = {
            "index": str(number),
            "image_path": str([str(path.resolve()) for path in paths]),
            "question": question["question"],
            "answer": question["output"].strip(),
            "category": question["task"],
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise SampleError(f"{where}: no usable {error}; expected MMIU's fields.") from error
    if row["answer"] not in options:
        raise SampleError(f"{where}: answer {row['answer']!r} is none of {sorted(options)}.")
    if missing := [path for path in paths if not path.is_file()]:
        raise SampleError(f"{where}: {missing[0]} is missing; extract the set's archives.")
    return row | options


if __name__ == "__main__":
    sys.exit(main())
