"""The benchmark of the KL head runs, and its JSON says what was not run."""

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks import kl_head


def test_a_small_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--shapes 40x16x300 --chunk-rows 16 --repeats 1 --device cpu".split()
    kl_head.main([*arguments, "--json", str(tmp_path / "out.json")])
    ours, textbook, liger = json.loads((tmp_path / "out.json").read_text())
    assert ours["time_s"] > 0
    assert 0 < ours["peak_bytes"] < textbook["peak_bytes"]
    if importlib.util.find_spec("liger_kernel") is None:
        assert liger["time_s"] is None
        assert "not installed" in liger["note"]
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_what_would_not_fit_is_not_tried(tmp_path: Path) -> None:
    arguments = "--shapes 40x16x300 --repeats 1 --skip-above 1e-6 --device cpu".split()
    kl_head.main([*arguments, "--json", str(tmp_path / "out.json")])
    textbook = json.loads((tmp_path / "out.json").read_text())[1]
    assert textbook["time_s"] is None
    assert "by estimate" in textbook["note"]
