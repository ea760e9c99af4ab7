"""The benchmark of a step runs, its phases are those of a step, and its JSON has what it prints."""

import json
from pathlib import Path

import pytest

from benchmarks import step


def test_a_small_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], single_process_groups: None
) -> None:
    arguments = "--size toy --pack-tokens 128 --num-packs 2 --steps 2 --warmup 1 --lr 1e-3".split()
    step.main([*arguments, "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["tokens_per_pack"]["reference"] == 128
    assert 128 * 0.25 < found["tokens_per_pack"]["policy"] < 128
    assert found["tokens_per_pack"]["response rows"] == 16
    assert len(found["ratios"]) == 2
    ran = {
        kind: {phase for phase, time_s in phases.items() if time_s > 0}
        for kind, phases in found["phases_s"].items()
    }
    assert ran["vico"] == set(step.PHASES)
    assert ran["sft"] == set(step.PHASES) - {"reference pass"}
    for bytes_of in found["reference_bytes"].values():
        assert bytes_of["kept"] == bytes_of["rows"] > 0
    assert "ratio" in capsys.readouterr().out
