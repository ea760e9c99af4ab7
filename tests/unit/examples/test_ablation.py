"""What the ablation says of its seeds: means, spreads, and which of the paper's claims hold."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[3] / "examples" / "ablation" / "run.py"
SCORES = {
    "vanilla": 0.98,
    "vanilla_vir": 0.20,
    "fastv": 0.60,
    "sparsevlm": 0.55,
    "all_compress": 0.70,
    "random_compress": 0.80,
    "image_level": 0.955,
    "vico": 0.979,
}


@pytest.fixture(scope="module")
def ablation():
    spec = importlib.util.spec_from_file_location("ablation_run", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["ablation_run"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def seed(*, error=0.002, compressed=0.65, **changes):
    scores = SCORES | changes
    return {
        row: {
            "row": row,
            "score": score,
            "standard_error": error,
            "retention": score / scores["vanilla"],
            "compressed_tiles": compressed,
            "visual_token_reduction": 0.75 * compressed,
        }
        for row, score in scores.items()
    }


def test_the_error_of_a_mean_is_the_larger_of_two(ablation):
    by_spread = ablation.measured([0.5, 0.6, 0.7], [0.01] * 3)
    assert (by_spread.mean, by_spread.spread) == pytest.approx((0.6, 0.1))
    assert by_spread.standard_error == pytest.approx(0.1 / 3**0.5)
    by_questions = ablation.measured([0.6, 0.6, 0.6], [0.03] * 3)
    assert by_questions.standard_error == pytest.approx(0.03 / 3**0.5)


def test_claims_hold_beyond_two_standard_errors_only(ablation):
    def held(seeds):
        return [claim.holds for claim in ablation.claims(seeds)]

    seeds = [seed(), seed(vico=0.98), seed(vico=0.978)]
    assert held(seeds) == [True] * 8
    # Random is better in two seeds of three, but not by enough.
    assert held([seed(), seed(all_compress=0.90), seed()])[1] is False
    assert held([seed(vico=0.955)] * 3)[3:7] == [False, True, True, False]
    assert held([seed(error=0.05)] * 3)[2:7] == [True, False, True, True, False]
    assert held([seed(fastv=0.977)] * 3)[4:6] == [False, True]
    assert held([seed(compressed=0.6)] * 3)[7] is False


def test_the_table_is_made_of_finished_demos(ablation, tmp_path, monkeypatch, capsys):
    ran = []

    def run(command, *, check):
        """The demo: writes what it does."""
        ran.append(command[2:])
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir(parents=True)
        rows = seed(vico=0.97 + 0.001 * len(ran))
        (folder / "results.json").write_text(
            json.dumps(
                [{k: v for k, v in row.items() if k != "standard_error"} for row in rows.values()]
            )
        )
        (folder / "details.json").write_text(json.dumps(list(rows.values())))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(ablation.subprocess, "run", run)
    monkeypatch.setattr(
        sys, "argv", ["run.py", "--quick", "--seeds", "1", "2", "--out", str(tmp_path)]
    )
    assert ablation.main() == 0
    assert [(words[1], words[-1]) for words in ran] == [("1", "--quick"), ("2", "--quick")]
    assert all("--resume" in words for words in ran)
    shown = capsys.readouterr().out
    assert "97.2 +- 0.1" in shown  # 97.1 and 97.2: mean 97.15
    assert "holds          Vanilla + ViR < ViCO (all compressed): +50.0 +- 0.2 points" in shown
    assert "| ViCO (random) | 80.0 +- 0.0 |" in (tmp_path / "table.md").read_text()
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"1", "2"}
