"""`python -m tests.gpu [CHECK ...]`: the checks for one GPU, most telling first, a line each.

Each runs in a process of its own. One that fails, hangs or is killed stops no other; the exit
status is 1 when one did, 3 when time ran out first. Results go to a file, a line of JSON each:
a second call does what the first left, a check that is named is done again. On a machine without a
network, `--packages` names a folder with wheels and archives. `python -m benchmarks.results` makes
a table of the results.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.gpu.run import LIMITS_S, NEEDED, Session, pending, run, unpacked

ROOT = Path(__file__).parents[2]
MISSING = """
import importlib.util, sys
for name in sys.argv[1:]:
    if not importlib.util.find_spec(name.split(".")[0]) or not importlib.util.find_spec(name):
        print(name)
"""
DEVICE = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU')"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks that are left, or the named ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"of {', '.join(LIMITS_S)}")
    parser.add_argument("--minutes", type=float, default=8, help="when to stop (default 8)")
    parser.add_argument("--journal", type=Path, default=ROOT / "benchmarks" / "gpu.jsonl")
    parser.add_argument("--packages", type=Path, help="folder with wheels, and TransformerEngine")
    parser.add_argument("--commit", help="where the files are without their repository")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.checks if name not in LIMITS_S]:
        parser.error(f"no such check: {', '.join(unknown)}; there are {', '.join(LIMITS_S)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a check ends with this
    with tempfile.TemporaryDirectory(prefix="gpu_packages") as folder:
        paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        if options.packages is not None:
            try:
                paths = unpacked(options.packages, Path(folder)) + paths
            except ValueError as error:
                parser.error(str(error))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        found = _output([sys.executable, "-c", MISSING, *NEEDED], environment)
        if missing := ", ".join(found.splitlines()):
            print(f"not here: {missing}; checks that need them will say so", flush=True)
        session = Session(
            journal=options.journal,
            minutes=options.minutes,
            command=lambda name, report: [sys.executable, "-m", "tests.gpu.one", name, str(report)],
            noted={
                "commit": options.commit or _commit(),
                "device": _output([sys.executable, "-c", DEVICE], environment) or "none",
            },
            environment=environment,
        )
        return run(options.checks or pending(LIMITS_S, session), session)


def _commit() -> str:
    commit = _output(["git", "rev-parse", "--short", "HEAD"]) or "unknown"
    changed = _output("git status --porcelain --untracked-files=no -- . :!benchmarks".split())
    return f"{commit} with changes" if changed else commit


def _output(command: list[str], environment: dict[str, str] | None = None) -> str:
    """What a command prints; nothing if it cannot be run."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main())
