"""Runs checks one after the other, each in a process of its own, within a budget of time.

What a check found is a line of JSON in a file, written as the check ends: a run that is cut off
keeps what it had, and the next goes on behind it. Standard library only, since the packages of the
machine are perhaps not unpacked yet.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMITS_S = {
    "versions": 90,
    "groups": 90,
    "wide_product": 90,
    "layers": 120,
    "stages": 240,
    "kl_head": 150,
    "step_8b_width": 150,
    "step_small_sizes": 150,
    "width": 120,
    "answers": 120,
    "vision": 90,
    "fp8": 90,
    "offload": 90,
}
"""The checks, most telling first, and how long each may take; after that it counts as hanging."""

NEEDED = (
    "annotated_types braceexpand docstring_parser filelock fsspec megatron.core numpy packaging PIL"
    " psutil pydantic pydantic_core safetensors sentencepiece tenacity tensorboard tokenizers torch"
    " tqdm transformers typeguard typing_inspection tyro webdataset yaml"
).split()
"""What the checks import of other packages; TransformerEngine's are told by the first of them."""

GRACE_S = 3
"""What one that is stopped has to write down what it found."""

SHORTEST_S = 5
"""With less than this left, no check is begun."""

Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Session:
    """One call: what it writes to, how it starts a check, and what is noted with each."""

    journal: Path
    minutes: float
    command: Callable[[str, Path], list[str]]
    """Of a check, by its name and the file that it writes its report to."""

    noted: dict[str, str]
    """Commit and device; what was found for the same ones is not done again."""

    environment: dict[str, str]


def lines_of(journal: Path) -> list[Line]:
    """What a journal holds; a line that was cut off is left out."""
    found = []
    for line in journal.read_text().splitlines() if journal.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def pending(names: Iterable[str], session: Session) -> list[str]:
    """Checks that have no result yet for this commit and device; none for want of a package."""
    done = {
        line["check"]
        for line in lines_of(session.journal)
        if line["result"] not in ("cut off", "lacks") and session.noted.items() <= line.items()
    }
    return [name for name in names if name not in done]


def run(names: Iterable[str], session: Session, *, limits_s: dict[str, int] = LIMITS_S) -> int:
    """Run checks until the time is spent; 0: all are well, 1: some are not, 3: some are left."""
    end = time.monotonic() + 60 * session.minutes
    names, failed = list(names), False
    for position, name in enumerate(names):  # noqa: B007
        start = time.monotonic()
        left_s = end - start
        if left_s < min(SHORTEST_S, limits_s[name]):
            break
        line = _one(name, session, min(left_s, limits_s[name]))
        if line["result"] == "hangs" and left_s < limits_s[name]:
            line["result"] = "cut off"
        line = {"check": name, **line, "seconds": round(time.monotonic() - start, 1)}
        _append(session.journal, line | session.noted | {"when": time.strftime("%Y-%m-%d %H:%M")})
        print(shown(line), flush=True)
        if line["result"] == "cut off":
            break
        failed |= line["result"] != "ok"
    else:
        return int(failed)
    print(f"{session.minutes:g} minutes are spent; call again for {', '.join(names[position:])}")
    return 3


def shown(line: Line) -> str:
    """A result in one line of text."""
    figures = ", ".join(
        f"{what} {value if isinstance(value, str) else format(value, '.4g')}"
        for what, value in line.get("figures", {}).items()
    )
    said = "; ".join(filter(None, (line.get("said"), figures)))
    return f"{line['result']:7} {line['check']:12} {said} [{line['seconds']:.0f} s]"


def unpacked(folder: Path, target: Path) -> list[str]:
    """Wheels and archives of a folder, unpacked without a network; what PYTHONPATH needs of them.

    Raises:
        ValueError: if the folder has no wheels, or pip or tar fails.
    """
    wheels = sorted(map(str, folder.rglob("*.whl")))
    if not wheels:
        raise ValueError(f"no wheels (*.whl) in {folder}; --packages names the folder with them")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    commands = [[*pip, "--target", str(target / "site"), *wheels]]
    paths = [str(target / "site")]
    for archive in sorted(folder.rglob("*.tar.*")):
        place = target / archive.name.split(".tar")[0]
        place.mkdir(parents=True)
        commands.append(["tar", "xf", str(archive), "-C", str(place)])
        paths.insert(0, str(place))
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{' '.join(command[:4])} ...: {' '.join(done.stderr.split())[-500:]}")
    return paths


def _one(name: str, session: Session, limit_s: float) -> Line:
    """Start a check, wait, and take its report; whatever it started ends with it."""
    with tempfile.TemporaryDirectory(prefix="gpu_check") as folder:
        report, output = Path(folder) / "report.json", Path(folder) / "output"
        with output.open("wb") as file:
            process = subprocess.Popen(
                session.command(name, report),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=session.environment,
                start_new_session=True,
            )
        try:
            status: int | None = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            status = None
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE_S)
        finally:
            _kill_group(process)
        line: Line = {}
        with contextlib.suppress(OSError, json.JSONDecodeError):
            line = json.loads(report.read_text())
        if status is None:
            line |= {"result": "hangs", "said": f"stopped after {limit_s:.0f} s"}
        elif not line:
            how = f"by signal {-status}" if status < 0 else f"with status {status} and no report"
            line = {"result": "killed", "said": f"ended {how}"}
        if line["result"] != "ok":
            line["output"] = output.read_text(errors="replace")[-3000:]
        return line


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _append(journal: Path, line: Line) -> None:
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the line of a run that was cut off
                file.write(b"\n")
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
