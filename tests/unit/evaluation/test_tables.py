"""The table's three forms."""

import json

from megatron_vico.evaluation import tables

NAMES = ("row", "score", "retention", "compressed_tiles", "visual_token_reduction")
SHARES = (("vanilla", 0.95, 1.0, 0.0, 0.0), ("vico", 0.9405, 0.99, 0.664, 0.498))
DICTS = [dict(zip(NAMES, row, strict=True)) for row in SHARES]
ROWS = [tables.TableRow(**row) for row in DICTS]
GRID = tables.ablation_grid(ROWS)


def test_json_holds_fractions_and_reads_back(tmp_path):
    path = tmp_path / "runs" / "results.json"
    tables.write_results(ROWS, path)
    assert json.loads(path.read_text()) == DICTS
    assert tables.read_results(path) == ROWS
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_text_is_aligned_and_markdown_has_its_cells():
    lines = tables.as_text(GRID).splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert lines[3].split() == ["ViCO", "94.0", "%", "99.0", "%", "66.4", "%", "49.8", "%"]
    lines = tables.as_markdown(GRID).splitlines()
    assert {line.count("|") for line in lines} == {6}
    assert lines[2] == "| Vanilla | 95.0 % | 100.0 % | 0.0 % | 0.0 % |"


def test_latex_escapes_and_the_notes_follow():
    grid = tables.Grid(headings=("a_b", "n"), lines=(("R&D", "5% +- 1"),), notes=("100 $",))
    assert tables.as_latex(grid).splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"a\_b & n \\",
        r"\midrule",
        r"R\&D & 5\% $\pm$ 1 \\",
        r"\bottomrule",
        r"\end{tabular}",
        "% 100 $",
    ]
    assert tables.as_text(grid).splitlines()[-1] == "100 $"
    assert tables.as_markdown(grid).splitlines()[-1] == "100 $"
