"""MMIU as VLMEvalKit reads it: a column an option, lists of paths, no missing image."""

import ast
import csv
import json
import sys

import pytest

from tests.training_runs import load_tool

QUESTION = {
    "task": "order",
    "question": "which\tcomes first?",
    "options": "A: the red\none\nB: the blue one\nC: none",
    "output": "B",
    "input_image_path": ["a/0.jpg", "a/1.jpg"],
}


@pytest.mark.parametrize("lines", [False, True])
def test_questions_become_rows(tmp_path, monkeypatch, capsys, lines):
    (tmp_path / "a").mkdir()
    for name in QUESTION["input_image_path"]:
        (tmp_path / name).touch()
    two = [QUESTION, QUESTION | {"options": "A: 1\nB: 2\nC: 3\nD: 4", "task": "count"}]
    text = "\n".join(map(json.dumps, two)) if lines else json.dumps(two)
    (tmp_path / "all.json").write_text(text)
    words = f"tool --questions {tmp_path}/all.json --images {tmp_path} --output {tmp_path}/M.tsv"
    monkeypatch.setattr(sys, "argv", words.split())
    assert load_tool("make_mmiu").main() == 0
    assert "2 questions of 2 tasks" in capsys.readouterr().out
    with (tmp_path / "M.tsv").open(newline="") as file:
        first, second = csv.DictReader(file, dialect="excel-tab")
    assert (first["A"], first["B"], first["C"], first["D"]) == (
        *("the red\none", "the blue one", "none"),
        "",
    )
    assert (first["question"], first["answer"], second["D"]) == ("which\tcomes first?", "B", "4")
    assert ast.literal_eval(first["image_path"]) == [
        str(tmp_path / name) for name in QUESTION["input_image_path"]
    ]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"output": "E"}, "answer 'E' is none of ['A', 'B', 'C']"),
        ({"options": None}, "no usable"),
        ({}, "a/0.jpg is missing; extract"),
    ],
)
def test_what_cannot_be_asked_is_named(tmp_path, change, error):
    tool = load_tool("make_mmiu")
    with pytest.raises(tool.SampleError) as raised:
        tool.row_of(QUESTION | change, 7, tmp_path)
    assert "question 7: " in str(raised.value)
    assert error in str(raised.value)
