"""What is installed: the wheel by itself, the container's lines, the files about the project."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import megatron_vico
from megatron_vico.cli.main import main

ROOT = Path(__file__).parents[2]


def _run(*words: str, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source archive, and that from a copy: setuptools leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    names = subprocess.run(
        ["git", "ls-files", "megatron_vico", "setup.py", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in names:
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    _run(
        "-c",
        f"from setuptools.build_meta import build_sdist as b; b({str(folder)!r})",
        cwd=folder / "source",
    )
    sdist = next(folder.glob("*.tar.gz"))
    _run(
        "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(sdist), cwd=folder
    )
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_works_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        file.extractall(tmp_path)
    package = ROOT / "megatron_vico"
    there = [path for path in package.rglob("*") if path.suffix in (".py", ".html", ".typed")]
    assert {str(path.relative_to(ROOT)) for path in there} <= names
    for words in (["--version"], ["train", "--stage", "router", "--print-config"], ["doctor"]):
        done = subprocess.run(
            [sys.executable, "-m", "megatron_vico", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout
        assert str(ROOT) not in done.stdout + done.stderr


def test_the_version_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron_vico {megatron_vico.__version__}\n"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == megatron_vico.__version__
    assert f"## {megatron_vico.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_container_copies_and_installs_what_is_there() -> None:
    text = (ROOT / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for word in line.split()]
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    assert copied
    assert all((ROOT / name).exists() for name in copied)
    assert set(copied) == allowed
    extras = re.findall(r"'\.\[(.+)\]'", text)[0].split(",")
    setup = (ROOT / "setup.py").read_text()
    assert all(f'"{extra}": [' in setup for extra in extras)


def test_hooks_and_forms_are_whole() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    makefile = (ROOT / "Makefile").read_text()
    for hook in hooks["repos"][0]["hooks"]:
        tool = hook["entry"].split()[0].removeprefix(".venv/bin/")
        assert f"$(BIN)/{tool}" in makefile, "a hook and `make lint` run the same tools"
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        assert path.name == "config.yml" or {"name", "description", "body"} <= set(form)
