"""Files that are whole or not there: JSON, and the name of what is not finished yet."""

import json
import os
from pathlib import Path
from typing import Any

from megatron_vico.errors import CheckpointError

INCOMPLETE_SUFFIX = ".incomplete"
"""Of a folder or file that is still being written, or whose writer was killed; readers refuse
it."""


def unfinished_path(target: Path) -> Path:
    """The name that `target` has until it is whole."""
    return target.with_name(target.name + INCOMPLETE_SUFFIX)


def refuse_incomplete(folder: Path) -> None:
    """Raise CheckpointError for a folder that is absent, or whose name says that it was never
    finished."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder.")
    if folder.name.endswith(INCOMPLETE_SUFFIX):
        raise CheckpointError(f"{folder} was never finished; write it again.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's contents; CheckpointError if it is absent or broken."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file.") from error
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} holds {type(contents).__name__}, expected a JSON object.")
    return contents


def write_json(path: Path, contents: Any, *, sort_keys: bool = True) -> None:
    """Write a JSON file as transformers does: indented, with a final newline; whole or not at all.

    Args:
        path: of the file; what is there is replaced in one step.
        contents: what `json` can write.
        sort_keys: whether keys are put in alphabetical order, as transformers does.
    """
    unfinished = unfinished_path(path)
    text = json.dumps(contents, indent=2, sort_keys=sort_keys, ensure_ascii=False)
    unfinished.write_text(text + "\n", encoding="utf-8")
    os.replace(unfinished, path)
