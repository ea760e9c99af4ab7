"""What the doctor makes of missing and of misleading packages."""

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vico.cli import doctor

ROOT = Path(__file__).parents[3]


def test_a_missing_requirement_is_said_and_is_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "webdataset" else "1.0")
    assert doctor.main([]) == 1
    assert "missing: webdataset; run `make venv`" in capsys.readouterr().out


def test_a_node_without_the_gpus_it_should_have_is_status_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert doctor.main([]) == 0
    assert doctor.main(["--gpus", "99"]) == 1
    assert " usable GPUs, expected 99" in capsys.readouterr().out.splitlines()[-1]


def find_apex(
    monkeypatch: pytest.MonkeyPatch, folder: Path, *, has_kernels: bool
) -> doctor.Finding:
    def find_spec(name: str) -> importlib.machinery.ModuleSpec | None:
        if name == "apex":
            spec = importlib.machinery.ModuleSpec("apex", None, is_package=True)
            spec.submodule_search_locations = [str(folder)]
            return spec
        return importlib.machinery.ModuleSpec(name, None) if has_kernels else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return doctor._apex()


def test_the_other_package_named_apex_is_not_taken_for_nvidias(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = find_apex(monkeypatch, tmp_path, has_kernels=False)
    assert (found.state, "another package of that name" in found.note) == ("absent", True)


def test_apex_counts_with_its_kernels_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "optimizers").mkdir()
    assert "without its CUDA kernels" in find_apex(monkeypatch, tmp_path, has_kernels=False).note
    assert find_apex(monkeypatch, tmp_path, has_kernels=True).state == "ok"


def test_an_accelerator_that_cannot_be_imported_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "2.0")
    found = doctor._accelerator("flash-attn", module="no_such_module_here", fallback="torch")
    assert found.state == "absent"
    assert (
        "cannot be imported (No module named 'no_such_module_here'); falls back to torch"
        in found.note
    )


def run_beside(engine: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`vico` in a process that finds a TransformerEngine whose `pytorch` is these lines."""
    package = folder / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text(engine)
    path = os.pathsep.join([str(ROOT), str(folder)])
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "megatron_vico", *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )


OF_ANOTHER_TORCH = "raise ImportError('x.so: undefined symbol: _ZN2at4_ops10zeros')"


@pytest.mark.slow
def test_an_engine_built_for_another_torch_is_broken(tmp_path: Path) -> None:
    """megatron-core takes only a missing module for no TransformerEngine."""
    done = run_beside(OF_ANOTHER_TORCH, tmp_path, "doctor")
    line = next(line for line in done.stdout.splitlines() if "transformer-engine" in line)
    assert line.startswith("broken")
    assert "x.so: undefined symbol: _ZN2at4_ops10zeros), and megatron-core not beside it" in line
    assert done.returncode == 1


@pytest.mark.slow
def test_beside_a_broken_engine_a_command_ends_in_one_line(tmp_path: Path) -> None:
    done = run_beside(OF_ANOTHER_TORCH, tmp_path, "checkpoint", str(tmp_path))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("ConfigError: megatron-core cannot be imported beside this Transformer")
    assert "undefined symbol" in line
    assert "pip uninstall transformer-engine" in line


@pytest.mark.slow
def test_an_engine_that_lacks_a_module_is_only_absent(tmp_path: Path) -> None:
    done = run_beside("import no_such_module", tmp_path, "doctor")
    line = next(line for line in done.stdout.splitlines() if "transformer-engine" in line)
    assert line.startswith("absent")
    assert "(No module named 'no_such_module'); falls back to megatron-core's local" in line


def test_without_a_compiler_nothing_runs_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert doctor._compiler().state == "ok"
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    headers = doctor._compiler()
    assert (headers.state, headers.note.partition(";")[0]) == (
        "broken",
        f"{tmp_path / 'Python.h'} is not there",
    )
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert doctor._compiler().note.startswith("no C compiler is found; install gcc: Triton")
