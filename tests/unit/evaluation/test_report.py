"""The page about a run: what it shows, from metrics alone and from all that may lie beside them."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from megatron_vico.cli.main import main
from tests.run_folders import write_run

PLAN = {
    "world_size": 128,
    "gpu": "h200",
    "expected_s": 61.2,
    "ranks": {"first": {"peak_bytes": 118e9, "flops": {"policy": 5e15, "encode": 2e15}}},
}


def page_of(run: Path, out: Path) -> str:
    assert main(["report", str(run), "--out", str(out)]) == 0
    return out.read_text()


@pytest.mark.slow
def test_metrics_alone_make_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "config.yaml").unlink()
    page = page_of(run / "metrics.jsonl", tmp_path / "page.html")
    # One file: nothing is fetched.
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    for title in ("Loss", "KL by share of compressed tiles", "Time of phases", "Fill of packs"):
        assert title in page
    assert page.count("<svg") == page.count("</svg>") == 13
    assert "TFLOP/s/GPU" in page
    assert "Plan against measured" not in page
    opened = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: opened.append(tag)  # type: ignore[method-assign]
    parser.feed(page)
    assert opened.count("table") == 2


@pytest.mark.slow
def test_what_lies_beside_is_shown(tmp_path: Path) -> None:
    write_run(tmp_path / "warmup", stage="warmup")
    router = write_run(tmp_path / "router", stage="router", router_percentile=55)
    (router / "plan.json").write_text(json.dumps(PLAN))
    Image.new("RGB", (3000, 900)).save(tmp_path / "router" / "routing.png")
    page = page_of(tmp_path, tmp_path / "page.html")
    assert page.count("<h2>") == 3  # two runs, and the picture
    assert "router_percentile: 55" in page
    assert "data:image/jpeg;base64," in page
    plan = page[page.index("Plan against measured") :]
    assert re.findall(r"<td>([^<]*)</td>", plan)[:9] == [
        *("ranks", "128", "128"),
        *("GB at most on the fullest rank (h200)", "118.0", "112.0"),
        *("seconds a step (planned: by formula)", "61.2", "27"),
    ]
    assert "Loss ratios and threshold" in page


def test_damaged_lines_are_left_out_and_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:4], b"\0" * 300, *lines[5:], b'{"iteration": 9']))
    page = page_of(run, tmp_path / "page.html")
    assert "2 damaged lines of metrics.jsonl are left out" in re.sub(r"\s+", " ", page)
    assert "5, 64" in page


@pytest.mark.parametrize(
    ("write", "message"),
    [
        ({}, "no metrics.jsonl in it or in its subfolders; give the --save folder"),
        ({"metrics.jsonl": "\0\0\n"}, "metrics.jsonl: no step in it (1 damaged lines)"),
        (
            {"metrics.jsonl": '{"iteration": 1, "loss": 1.0}', "plan.json": "[]"},
            "plan.json holds list, expected a JSON object",
        ),
        (
            {"metrics.jsonl": '{"iteration": 1, "loss": 1.0}', "plan.json": '{"ranks": {"0": 3}}'},
            "plan.json is not what `vico plan --json` writes",
        ),
        ({"metrics.jsonl": '{"iteration": 1, "loss": 1.0}', "plan.json": "{"}, "is not valid JSON"),
        (
            {"metrics.jsonl": '{"iteration": 1, "loss": 1.0}', "config.yaml": "a: ["},
            "config.yaml is not valid YAML",
        ),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    write: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in write.items():
        (tmp_path / name).write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
