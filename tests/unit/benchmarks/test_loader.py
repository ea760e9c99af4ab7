"""The benchmark of the loader runs, and its JSON has what it prints."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import loader
from megatron_vico.config.stages import STAGES


@pytest.mark.slow
def test_a_few_samples(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    single_process_groups: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("DEMO", "FULL_SIZE"):
        few = dataclasses.replace(getattr(loader, name), num_samples=6, size=(64, 64))
        # Of full size only the JPEG is left: a tile of 448 px takes the toy a second.
        monkeypatch.setattr(loader, name, dataclasses.replace(few, image_size=32, patch_size=8))
    loader.main(["--samples", "6", "--steps", "1", "--out", str(tmp_path / "out.json")])
    tables = json.loads((tmp_path / "out.json").read_text())
    assert [(row["name"], row["stage"]) for row in tables["prepared"]] == [
        (name, stage) for name in ("demo", "full size") for stage in STAGES
    ]
    assert all(row["samples_per_s"] > 0 and row["mb_per_s"] > 0 for row in tables["prepared"])
    assert all(0 <= row["lost_share"] <= 1 and row["consumed_per_s"] > 0 for row in tables["fed"])
    printed = capsys.readouterr().out
    assert "MB/s per core" in printed
    assert "of the time lost to data" in printed
