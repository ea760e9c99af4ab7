"""A file system for fsspec that reads local files and fails when told to; asynchronous, as those of
s3 and http."""

import os
from pathlib import Path
from typing import ClassVar

import fsspec
from fsspec.asyn import AsyncFileSystem

CUT, WHOLE = "cut", "whole"


class FlakyFiles(AsyncFileSystem):
    """flaky:///folder/file is /folder/file."""

    protocol = "flaky"

    script: ClassVar[dict[str, list[Exception | str | None]]] = {}
    """What the next requests for a file of this name meet:
    an error, half of the content (CUT), the WHOLE file for a range, or None."""

    log: ClassVar[Path] = Path(os.devnull)
    """Gets the name of each file that content was asked of, a line each, from all processes."""

    async def _cat_file(self, path, start=None, end=None, **_):
        name = Path(path).name
        with self.log.open("a") as log:
            log.write(name + "\n")
        outcomes = self.script.get(name, [])
        outcome = outcomes.pop(0) if outcomes else None
        if isinstance(outcome, Exception):
            raise outcome
        content = Path(path).read_bytes()[slice(start, end) if outcome != WHOLE else slice(None)]
        return content[: len(content) // 2] if outcome == CUT else content

    async def _info(self, path, **_):
        return {"name": path, "size": Path(path).stat().st_size, "type": "file"}


def install(monkeypatch, tmp_path):
    """Register flaky:// for one test; returns the class, with an empty script and a log of its
    own."""
    fsspec.register_implementation("flaky", FlakyFiles, clobber=True)
    monkeypatch.setattr(FlakyFiles, "script", {})
    monkeypatch.setattr(FlakyFiles, "log", tmp_path / "requests.log")
    FlakyFiles.log.touch()
    return FlakyFiles
