"""Packing and balance on a smaller simulation than the benchmark's; the benchmark runs."""

import json
from pathlib import Path

import pytest

from benchmarks import packing


def test_packs_are_full_on_the_mixture_though_tiles_are_limited() -> None:
    row = packing.measure_packing(packing.mixture_folder(20_000))
    assert row.fill > 0.98  # measured 0.9965
    assert 0.55 < row.visual < 0.65


def test_packs_are_full_where_four_in_five_tokens_are_visual() -> None:
    row = packing.measure_packing(packing.mixture_folder(20_000, text=0.35))
    assert row.visual > 0.8
    assert row.fill > packing.FILL_GOAL  # measured 0.998


def test_where_tiles_bind_packs_are_full_of_tiles() -> None:
    row = packing.measure_packing(packing.mixture_folder(20_000, text=0.15))
    assert row.fill < row.possible < 0.99
    assert row.tile_fill > 0.98  # measured 0.99


def test_ranks_have_nearly_the_same_work() -> None:
    row = packing.measure_balance(num_samples=20_000, longest=8192, dp_size=64, num_steps=6)
    assert row.floor <= row.whole < 1.03 < row.dealt
    assert row.in_step < 1.03 < row.loose


def test_ranks_have_nearly_the_same_work_where_texts_are_long() -> None:
    row = packing.measure_balance(num_samples=20_000, longest=32768, dp_size=64, num_steps=6)
    assert row.worst < packing.BALANCE_GOAL < row.floor <= row.whole
    assert row.in_step < packing.BALANCE_GOAL < row.floor  # measured 1.023
    assert row.microbatches < 1.15  # measured 1.07


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packing.main(
        ["--num-samples", "2000", "--num-steps", "1", "--json", str(tmp_path / "out.json")]
    )
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["window"] for row in found["packing"][:5]] == [64, 128, 256, 512, 1024]
    assert [row["dp_size"] for row in found["balance"]] == [8, 64, 8, 64]
    assert len(capsys.readouterr().out.splitlines()) == 17
