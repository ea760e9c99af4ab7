"""The benchmark of a step runs, its phases are those of a step, and its JSON has what it prints."""

import json
from pathlib import Path

import pytest

from benchmarks import step
from tests.gpu import __main__ as gpu
from tests.gpu.run import LIMITS_S


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


@pytest.mark.slow
def test_a_device_is_given_to_the_checks_of_make_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same code, its journal and its goals: `python -m benchmarks.results` reads it."""
    given = []
    monkeypatch.setattr(gpu, "run", lambda names, session: given.append((names, session)) or 3)
    journal = tmp_path / "gpu.jsonl"
    words = ["--json", str(journal), "--minutes", "2"]
    assert step.main(["--device", "cpu", *words]) == 3
    ((names, session),) = given
    assert set(names) == {check for check in LIMITS_S if check.startswith("step_")}
    assert (session.journal, session.minutes) == (journal, 2)
    with pytest.raises(SystemExit):
        step.main(["--device", "cuda"])
    assert "--device cuda, but torch finds no GPU" in capsys.readouterr().err
