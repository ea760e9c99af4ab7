"""The command keeps to its time, stops for no check, and goes on where it ended."""

import contextlib
import importlib.metadata
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.__main__ import ROOT, main
from tests.gpu.run import NEEDED, Session, lines_of, pending, run, unpacked

# What stands for a check, by its name; the report is argument 2.
SCRIPT = """
import os, signal, subprocess, sys, time
name, report = sys.argv[1:]
if name.startswith("hangs"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("pid", child.pid, flush=True)
    time.sleep(600)
if name == "tells":
    def tell(*_):
        open(report, "w").write('{"result": "hangs", "figures": {"ms": 2.5}}')
        sys.exit()
    signal.signal(signal.SIGTERM, tell)
    time.sleep(600)
if name == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if name == "silent":
    sys.exit(7)
if name.startswith("slow"):
    time.sleep(1.5)
result = '"FAIL", "said": "no kernel"' if name == "fails" else '"ok", "figures": {"ms": 1.5}'
open(report, "w").write('{"result": ' + result + '}')
"""


def session(folder: Path, *, minutes: float = 1.0, **noted: str) -> Session:
    return Session(
        journal=folder / "gpu.jsonl",
        minutes=minutes,
        command=lambda name, report: [sys.executable, "-c", SCRIPT, name, str(report)],
        noted={"commit": "abc", "device": "CPU"} | noted,
        environment=dict(os.environ),
    )


def limits(*names: str, **seconds: int) -> dict[str, int]:
    return dict.fromkeys(names, 30) | seconds


def found(folder: Path) -> dict[str, Any]:
    return {line["check"]: line for line in lines_of(folder / "gpu.jsonl")}


def test_one_that_fails_hangs_or_is_killed_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["fails", "hangs", "tells", "killed", "silent", "good"]
    assert run(names, session(tmp_path), limits_s=limits(*names, hangs=1, tells=1)) == 1
    lines = found(tmp_path)
    assert {name: line["result"] for name, line in lines.items()} == {
        "fails": "FAIL",
        "hangs": "hangs",
        "tells": "hangs",
        "killed": "killed",
        "silent": "killed",
        "good": "ok",
    }
    assert lines["tells"]["figures"] == {"ms": 2.5}  # and what it had found is kept
    assert lines["killed"]["said"] == "ended by signal 9"
    assert lines["silent"]["said"] == "ended with status 7 and no report"
    assert lines["good"]["figures"] == {"ms": 1.5}
    assert {line["commit"] for line in lines.values()} == {"abc"}
    grandchild = int(lines["hangs"]["output"].split()[1])
    assert not is_running(grandchild), "what a hanging check started lives on"
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("FAIL    fails        no kernel")
    assert printed[-1].startswith("ok      good         ms 1.5")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_budget_and_a_second_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.gpu.run.SHORTEST_S", 0.5)
    names = ["slow a", "hangs", "slow b"]
    few = limits(*names)
    start = time.monotonic()
    assert run(names, session(tmp_path, minutes=0.1), limits_s=few) == 3
    assert time.monotonic() - start < 9  # 6 and what it takes to end a process
    assert "call again for hangs, slow b" in capsys.readouterr().out
    assert found(tmp_path)["hangs"]["result"] == "cut off"
    assert pending(names, session(tmp_path)) == ["hangs", "slow b"]
    # Too little time for any.
    assert run(["slow b"], session(tmp_path, minutes=0.005), limits_s=few) == 3
    few["hangs"] = 1
    assert run(pending(names, session(tmp_path)), session(tmp_path), limits_s=few) == 1
    assert pending(names, session(tmp_path)) == []
    results = [line["result"] for line in lines_of(tmp_path / "gpu.jsonl")]
    assert results == ["ok", "cut off", "hangs", "ok"]


def test_what_was_found_elsewhere_is_done_again(tmp_path: Path) -> None:
    assert run(["good"], session(tmp_path), limits_s=limits("good")) == 0
    assert pending(["good"], session(tmp_path)) == []
    assert pending(["good"], session(tmp_path, commit="def")) == ["good"]
    assert pending(["good"], session(tmp_path, device="H100")) == ["good"]


def test_a_line_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    journal = tmp_path / "gpu.jsonl"
    journal.write_text('{"check": "good", "resu')
    assert pending(["good"], session(tmp_path)) == ["good"]
    run(["good"], session(tmp_path), limits_s=limits("good"))
    assert pending(["good"], session(tmp_path)) == []
    assert len(journal.read_text().splitlines()) == 2


def test_a_call_that_is_ended_takes_its_check_with_it(tmp_path: Path) -> None:
    code = (
        "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143));"
        "from pathlib import Path; from tests.gpu.test_run import *;"
        f"run(['hangs'], session(Path({str(tmp_path)!r})), limits_s=limits('hangs'))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    check = child_of(child_of(parent.pid))
    parent.terminate()
    assert parent.wait(timeout=30) == 143
    assert not is_running(check)


def child_of(pid: int) -> int:
    """The first process that it starts."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    while not (started := children.read_text().split()):
        time.sleep(0.1)
    return int(started[0])


def test_packages_without_a_network(tmp_path: Path) -> None:
    """A wheel, and an archive as TransformerEngine's comes in."""
    wheels, files = tmp_path / "wheels", tmp_path / "files"
    wheel_name, archive_name = "small_thing", "engine_thing"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "small_thing-1.0-py3-none-any.whl", "w") as wheel:
        info = "small_thing-1.0.dist-info"
        wheel.writestr(f"{wheel_name}.py", "FOUND = 1\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-thing\nVersion: 1.0")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    files.mkdir()
    (files / f"{archive_name}.py").write_text("FOUND = 2\n")
    archive = ["tar", "cJf", str(tmp_path / "te-1.0.tar.xz"), "-C", str(files), "."]
    subprocess.run(archive, check=True)
    paths = unpacked(tmp_path, tmp_path / "unpacked")
    code = "import small_thing, engine_thing; print(small_thing.FOUND + engine_thing.FOUND)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "3\n", done.stderr
    with pytest.raises(ValueError, match=r"no wheels \(\*\.whl\) in .*files; --packages names"):
        unpacked(files, tmp_path / "nothing")


def test_the_wheels_are_what_a_machine_with_transformers_may_lack() -> None:
    """`make gpu-packages` fetches all that the checks import and that those do not bring."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    (listed,) = re.findall(r"^GPU_PACKAGES = (.*)$", makefile, re.MULTILINE)
    there = set[str]()
    left = "torch transformers sentencepiece tensorboard matplotlib".split()
    while left:
        if (name := _canonical(left.pop())) not in there:
            there.add(name)
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                left += [
                    each for each in importlib.metadata.requires(name) or () if ";" not in each
                ]
    of_import = importlib.metadata.packages_distributions()
    needed = {_canonical(of_import[name.partition(".")[0]][0]) for name in NEEDED}
    assert needed - there <= set(listed.split()) <= needed


def _canonical(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement)[0]).lower()


@pytest.mark.slow
def test_what_lacks_a_package_names_it_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine whose wheels are not all there; with them it is done again."""
    hidden = (tmp_path / "sitecustomize").with_suffix(".py")
    hidden.write_text(
        """
import importlib.util, sys
class Hidden:
    def find_spec(self, name, *rest):
        if name == "tyro":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name == "tyro" else find(name)
"""
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    journal = ["--journal", str(tmp_path / "gpu.jsonl"), "--commit", "abc"]
    assert main([*journal, "step_8b_width", "wide_product"]) == 1
    missing, lacks, good = capsys.readouterr().out.splitlines()
    assert missing == "not here: tyro; checks that need them will say so"
    assert lacks.startswith("lacks   step_8b_width there is no module tyro: put its wheel into")
    assert good.startswith("ok      wide_product")
    assert pending(["step_8b_width"], session(tmp_path)) == ["step_8b_width"]


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = tmp_path / "gpu.jsonl"
    arguments = ["--journal", str(journal), "--commit", "abc", "wide_product"]
    assert main(arguments) == 0
    (line,) = lines_of(journal)
    assert line["figures"]["largest error"] < 1e-3
    assert (line["commit"], line["result"]) == ("abc", "ok")
    assert line["versions"]["megatron-core"].startswith("0.")
    assert capsys.readouterr().out.startswith("ok      wide_product largest error")
    with pytest.raises(SystemExit):
        main(["version"])
    assert "no such check: version; there are versions, groups" in capsys.readouterr().err
