"""The table's three forms."""

import json

from megatron_vico.evaluation import tables

SHARES = {
    "vanilla": {"score": 0.95, "retention": 1.0},
    "vico": {"score": 0.9405, "retention": 0.99},
}
SAVED = {
    "vanilla": {"compressed_tiles": 0.0, "visual_token_reduction": 0.0},
    "vico": {"compressed_tiles": 0.664, "visual_token_reduction": 0.498},
}
ROWS = [tables.TableRow(row=row, **SHARES[row], **SAVED[row]) for row in SHARES]


def test_json_holds_fractions_and_reads_back(tmp_path):
    path = tmp_path / "runs" / "results.json"
    tables.write_results(ROWS, path)
    assert json.loads(path.read_text())[1] == {"row": "vico", **SHARES["vico"], **SAVED["vico"]}
    assert tables.read_results(path) == ROWS
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_text_is_aligned_and_in_per_cent():
    lines = tables.as_text(ROWS).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert lines[3].split() == ["ViCO", "94.0", "%", "99.0", "%", "66.4", "%", "49.8", "%"]


def test_markdown_has_a_cell_for_each_heading():
    lines = tables.as_markdown(ROWS).splitlines()
    assert {line.count("|") for line in lines} == {6}
    assert lines[2] == "| Vanilla | 95.0 % | 100.0 % | 0.0 % | 0.0 % |"
