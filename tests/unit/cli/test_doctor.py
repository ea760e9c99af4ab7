"""What the doctor makes of missing and of misleading packages."""

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest

from megatron_vico.cli import doctor


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
