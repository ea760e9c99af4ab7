"""The table of figures from GPUs holds what was run, and nothing where nothing was."""

from pathlib import Path
from typing import Any

from benchmarks import results
from tests.gpu.run import lines_of

SAID = {"commit": "abc", "when": "2026-01-01 00:00", "versions": {"torch": "2.11"}}


def line(check: str, **given: Any) -> dict[str, Any]:
    return {"check": check, "result": "ok", "device": "H100", "seconds": 1.0} | SAID | given


def test_the_file_is_what_the_command_makes() -> None:
    found = lines_of(results.FOLDER / "gpu.jsonl")
    assert (results.FOLDER / "RESULTS.md").read_text() == results.text_of(found)


def test_without_a_gpu_it_holds_nothing(tmp_path: Path) -> None:
    arguments = ["--journal", str(tmp_path / "none"), "--out", str(tmp_path / "RESULTS.md")]
    results.main(arguments)
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.endswith(results.NOT_RUN)
    assert "|" not in text
    assert results.text_of([line("offload", device="CPU", figures={"GB/s": 5.0})]) == text


def test_figures_stand_beside_their_goals() -> None:
    time, ratio = f"{results.SHAPE} ms", "textbook ms over ours"
    found = [
        line("kl_head", figures={time: 60.0}),
        line("fp8", result="hangs", said="stopped after 90 s"),
        line("kl_head", commit="def", figures={time: 90.0, ratio: 2.5}),
        line("kl_head", device="H200", figures={time: 70.0}),
        line("width", result="cut off", said="stopped"),
    ]
    first, second = results.text_of(found).split("## H200")
    assert f"| kl_head | {time} | 90 | at most 80: **missed** |" in first
    assert f"| kl_head | {ratio} | 2.5 | at least 2: reached |" in first
    assert "| fp8 | **hangs** | stopped after 90 s | |" in first
    assert "- kl_head: commit def, 2026-01-01 00:00; torch 2.11" in first
    assert "stages, step_8b_width, step_small_sizes, width, answers, vision, offload." in first
    assert "| 70 | at most 80: reached |" in second
