"""The sweep at toy size on CPUs, and the table and plots of scaling runs."""

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.run_folders import write_run
from tests.training_runs import ToyData, load_tool, toy_settings

ROOT = Path(__file__).parents[3]
TOOL = load_tool("scaling_report")


@pytest.mark.slow
def test_a_sweep_on_this_machine(
    toy_data: ToyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "toy.yaml"
    own = {"stage": "pretrain", "model_size": "toy"}
    recipe.write_text(yaml.safe_dump(toy_settings(toy_data) | own))
    cases = tmp_path / "cases.tsv"
    lines = ("two\tstrong\t2", "odd\tstrong\t3")
    cases.write_text("# toys\n" + "".join(f"{line}\t{recipe}\t--lr 1e-3\n" for line in lines))
    environment = os.environ | {
        "LOCAL": "1",
        "GPUS_PER_NODE": "1",
        "STEPS": "3",
        "RUNS": str(tmp_path / "runs"),
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        ["examples/scaling/sweep.sh", cases, "--gpu-peak-tflops", "0.1"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "strong/odd is left out: ConfigError" in done.stderr
    assert not list((tmp_path / "runs").glob("**/iter_*"))
    picture = tmp_path / "scaling.png"
    arguments = [str(tmp_path / "runs"), "--plot", str(picture), "--format", "csv"]
    assert TOOL.main(arguments) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["series"], row["run"], row["ranks"]) == ("strong", "two", "2")
    assert float(row["tokens/s/GPU"]) > 0
    assert row["MFU"].endswith("%")
    assert float(row["GB planned"]) >= 0
    assert all(row[phase].endswith("%") for phase in ("encode", "policy", "optimizer"))
    assert row["strong"] == "100.0%"
    assert picture.stat().st_size > 10_000


def test_efficiency_is_over_the_fewest_ranks_of_a_series(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for ranks, batch in ((8, 32), (16, 64)):
        write_run(tmp_path / "weak" / f"n{ranks}", world_size=ranks, global_batch_size=batch)
        write_run(
            tmp_path / "strong" / f"n{ranks}",
            world_size=ranks,
            global_batch_size=256,
            bf16=True,
            tensor_model_parallel_size=2,
        )
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.jsonl").write_text("\0\0\0\n")
    assert TOOL.main([str(tmp_path), "--format", "csv"]) == 0
    out, err = capsys.readouterr()
    found = {(row["series"], row["run"]): row for row in csv.DictReader(io.StringIO(out))}
    assert found["weak", "n16"]["weak"] == "100.0%"
    assert found["weak", "n16"]["strong"] == ""
    assert found["strong", "n16"]["strong"] == "100.0%"
    assert found["strong", "n16"]["layout"] == "TP2"
    assert found["strong", "n16"]["precision"] == "bf16"
    assert found["strong", "n16"]["policy"] == "52%"
    assert "broken/metrics.jsonl: no step in it" in err
    for form, start in (("markdown", "| "), ("text", "series")):
        TOOL.main([str(tmp_path), "--format", form])
        assert capsys.readouterr().out.lstrip().startswith(start)


def test_no_runs_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert TOOL.main([str(tmp_path)]) == 2
    assert "no run with a metrics.jsonl below" in capsys.readouterr().err
