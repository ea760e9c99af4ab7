"""The demo's mechanics: the quick run from pictures to a routed, exported and evaluated model."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from safetensors import safe_open

from megatron_vico.vico.compression_plan import plan_none
from tests.distributed import programs

pytestmark = pytest.mark.slow
QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
PRUNED = ("fastv", "fastv_default", "sparsevlm", "sparsevlm_default")
ROWS = (
    *("vanilla", "vanilla_vir", "vanilla_one_tile", *PRUNED, "all_compress", "random_compress"),
    *("image_level", "vico"),
)
STAGES = ("pretrain", "warmup", "consistency", "router", "router_image")


class Forked:
    """What the demo's driver uses of a `subprocess.Popen`; the program ends before it is read."""

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], **_: object) -> None:
        self.done = programs.run(command[1:], environ=env)
        self.stdout = io.BytesIO(self.done.stdout.encode())

    def wait(self) -> int:
        return self.done.returncode


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    # The number of processes changes no loss.
    words = ["run.py", "--quick", "--processes", "1", "--out", str(folder)]
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        patch.syspath_prepend(QUICKSTART)
        patch.setattr(subprocess, "Popen", Forked)
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(QUICKSTART / "run.py"), run_name="__main__")
    assert end.value.code == 0, told.getvalue()[-6000:]
    assert "routing.png" in told.getvalue()
    return folder


def losses(run: Path, stage: str) -> list[float]:
    return [
        json.loads(line)["loss"]
        for line in (run / stage / "metrics.jsonl").read_text().splitlines()
    ]


def test_the_table_has_its_rows_and_their_figures_fit_together(run: Path) -> None:
    rows = json.loads((run / "results.json").read_text())
    assert [row["row"] for row in rows] == list(ROWS)
    assert all(
        set(row) == {"row", "score", "retention", "compressed_tiles", "visual_token_reduction"}
        for row in rows
    )
    table = {row["row"]: row for row in rows}
    assert table["vanilla"]["compressed_tiles"] == float(plan_none(4).float().mean())
    assert table["vanilla"]["retention"] == 1.0
    assert table["all_compress"]["compressed_tiles"] == 1.0
    assert table["random_compress"]["compressed_tiles"] == table["vico"]["compressed_tiles"]
    assert table["vanilla_vir"]["compressed_tiles"] == table["vico"]["compressed_tiles"]
    # Of 16 tokens in three layers FastV keeps 16, 8 and 8; SparseVLM 16, 9 and 4.
    assert table["fastv_default"]["visual_token_reduction"] == 1 - 11 / 16
    assert table["sparsevlm_default"]["visual_token_reduction"] == 1 - 10 / 16
    for row in (row for row in rows if row["row"] not in PRUNED):
        # Three of a compressed tile's four visual tokens go.
        assert row["visual_token_reduction"] == pytest.approx(0.75 * row["compressed_tiles"])


def test_every_stage_learns_and_reports(run: Path) -> None:
    for stage in ("pretrain", "consistency"):
        found = losses(run, stage)
        assert sum(found[-5:]) < 0.8 * sum(found[:5]), (stage, found)
    for stage in STAGES:
        assert (run / stage / "latest_checkpointed_iteration.txt").exists()
        assert (run / stage / "config.yaml").exists() or list(
            (run / stage).glob("iter_*/config.yaml")
        )
        assert list((run / stage / "tensorboard").iterdir())


def test_the_export_has_router_and_second_connector(run: Path) -> None:
    config = json.loads((run / "flash" / "config.json").read_text())
    assert config["flash_mode"] is True
    keys: set[str] = set()
    for path in (run / "flash").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            keys |= set(file.keys())
    assert {
        "mlp2.7.weight",
        "gating.gate.1.weight",
        "pooling_before_gating.attn4.in_proj_weight",
    } <= keys


def test_the_pictures_are_there(run: Path) -> None:
    for name in ("routing.png", "loss.png", "overlay.png", "routed_page.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")


def test_the_notebook_shows_the_same(run: Path, tmp_path: Path) -> None:
    notebook = json.loads((QUICKSTART / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    (tmp_path / "cells").write_text("\n".join(cells))
    done = programs.run([tmp_path / "cells"], environ={**os.environ, "VICO_RUN": str(run)})
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("done already") == len(STAGES) + 8, "nothing was run again"
    assert (run / "table.txt").read_text() in done.stdout
    assert "compressed: [" in done.stdout
    assert ", and right is " in done.stdout
