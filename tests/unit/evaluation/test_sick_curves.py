"""tools/sick_curves.py: its commands are runs that work, and a picture has a line a run."""

import json
from pathlib import Path

import pytest

from megatron_vico.config.flags import parse
from megatron_vico.config.validate import validate
from tests.training_runs import load_tool

TOOL = load_tool("sick_curves")


@pytest.mark.parametrize("name", TOOL.RUNS)
def test_its_commands_are_runs_that_work(name: str) -> None:
    folders = {"demo": Path("d"), "work": Path("w"), "run": Path("w/run")}
    command, *words = TOOL.training(TOOL.RUNS[name], **folders)
    assert command == "train"
    validate(parse(words), 1)


def test_answers_go_to_other_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [[{"from": "human", "value": "?"}, {"from": "gpt", "value": str(n)}] for n in range(9)]
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"image": f"{n}.png", "conversations": turns[n]}) for n in range(9)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    done: list[list[str]] = []
    monkeypatch.setattr(TOOL, "execute", done.append)
    TOOL.shuffle_answers(tmp_path, tmp_path)
    found = [json.loads(line) for line in (tmp_path / "shuffled.jsonl").read_text().splitlines()]
    answers = [each["conversations"][1]["value"] for each in found]
    assert [each["image"] for each in found] == [f"{n}.png" for n in range(9)]
    assert sorted(answers) == [str(n) for n in range(9)] != answers
    assert len(done) == 1


def test_a_panel_has_two_lines_a_run(tmp_path: Path) -> None:
    rows = [json.dumps({"iteration": step, "loss": 1 / step}) for step in range(1, 31)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    figure = TOOL.panels([("loss", {"healthy": tmp_path, "sick": tmp_path})])
    (panel,) = figure.axes
    assert [len(line.get_xdata()) for line in panel.lines] == [21, 30, 21, 30]
