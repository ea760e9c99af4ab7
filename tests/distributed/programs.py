"""Python programs as a user starts them, in processes forked from one that has imported what they
need: 4 to 8 s of CPU each otherwise, for torch, megatron-core and what a first step imports.
"""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

from tests.distributed.launch import ROOT, preloading


def start(
    words: Sequence[str | Path], *, log: Path, environ: Mapping[str, str] | None = None
) -> BaseProcess:
    """`python WORDS` in the root of this repository and in a session of its own; what it prints is
    added to a file.

    Args:
        words: `-m MODULE` or a script, and its arguments; Python's `-u` before them has no effect.
        log: gets stdout and stderr.
        environ: all of its environment; None, this process's.
    """
    process = preloading().Process(
        target=_session,
        args=([*map(str, words)], log, {**(environ or os.environ)}),
        daemon=True,  # a test that fails leaves none behind
    )
    process.start()
    return process


def run(
    words: Sequence[str | Path], *, environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A program from beginning to end; what it says as an error is among its output."""
    with tempfile.TemporaryDirectory() as folder:
        process = start(words, log=Path(folder) / "log", environ=environ)
        process.join()
        said = (Path(folder) / "log").read_text()
    assert process.exitcode is not None
    return subprocess.CompletedProcess(words, process.exitcode, said)


def _session(words: Sequence[str], log: Path, environ: Mapping[str, str]) -> None:
    os.setsid()
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    with log.open("ab") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    multiprocessing.set_start_method("fork", force=True)  # Linux' own
    # What the program leaves in shared memory is for a tracker of its own to find, not for ours.
    resource_tracker._resource_tracker._fd = resource_tracker._resource_tracker._pid = None
    _run(words, environ)


def _run(words: Sequence[str], environ: Mapping[str, str]) -> NoReturn:
    """Be that program, to its end."""
    gc.freeze()  # megatron-core collects garbage with each checkpoint: 0.2 s among all modules
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(ROOT)
    status = 0
    try:
        _play(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _play(words: Sequence[str]) -> None:
    first = next(index for index, word in enumerate(words) if word == "-m" or word[0] != "-")
    sys.argv = list(words[first + (words[first] == "-m") :])
    if words[first] == "-m":
        if sys.argv[0] == "torch.distributed.run":
            _fork_ranks()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name="__main__")


def _fork_ranks() -> None:
    """torchrun's ranks too are forks, of torchrun: where Popen would have begun a program, it goes
    on as that program."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    def forked(args: Sequence[str], env: Mapping[str, str], **options: Any) -> Any:
        def instead() -> NoReturn:
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # Popen waits for the last of them
            _run(args[1:], env)

        return subprocess.Popen(args, preexec_fn=instead, **options)

    subprocess_handler.Popen = forked
