"""Files that are whole or not there: JSON, and the name of what is not finished yet."""

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from megatron_vico.errors import CheckpointError, ConfigError

INCOMPLETE_SUFFIX = ".incomplete"
"""Of a file or folder that is being written, or whose writer was killed; readers refuse it."""


MAX_FILE_BYTES = 1 << 30
"""Of a file of a sample: an image, or its text; what is larger is not read."""


CODE_FIELDS = {"auto_map", "custom_pipelines", "trust_remote_code"}
"""Of configs: they name Python files beside them that transformers would run."""


def unfinished_path(target: Path) -> Path:
    """The name that `target` has until it is whole."""
    return target.with_name(target.name + INCOMPLETE_SUFFIX)


def refuse_incomplete(folder: Path) -> None:
    """Raise CheckpointError for a folder that is absent or that its writer never finished."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder.")
    if folder.name.endswith(INCOMPLETE_SUFFIX):
        raise CheckpointError(f"{folder} was never finished; write it again.")


def refuse_missing(flag: str, path: str | Path | None) -> None:
    """Raise ConfigError for a path of a flag where nothing is."""
    if path is not None and not Path(path).exists():
        raise ConfigError(f"{flag} {path}: no such file or folder (looked from {Path.cwd()}).")


PICTURES = (".png", ".pdf", ".svg", ".jpg")
"""Endings of files that Pillow and matplotlib write."""


def refuse_unwritable(flag: str, path: Path | None, *, endings: Sequence[str] = ()) -> None:
    """Raise ConfigError for a flag's file that could not be written when all work is done."""
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{flag} {path}: a folder, expected the name of a file.")
    if not os.access(path.absolute().parent, os.W_OK):
        parent = path.absolute().parent
        raise ConfigError(f"{flag} {path}: {parent} is no folder that can be written; make it.")
    if endings and path.suffix.lower() not in endings:
        raise ConfigError(f"{flag} {path}: expected a name that ends in {', '.join(endings)}.")


def open_plain(path: Path) -> BufferedReader:
    """A plain file to read; a pipe or a device, which may have no end, is not waited for.

    Raises:
        OSError: if it is none, or cannot be opened.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "not a plain file but a device or a pipe", str(path))
    return path.open("rb")


def read_plain(path: Path) -> bytes:
    """A plain file's content; OSError as `open_plain`, or if it has more than MAX_FILE_BYTES."""
    with open_plain(path) as file:
        content = file.read(MAX_FILE_BYTES + 1) or b""
        if len(content) > MAX_FILE_BYTES:
            raise OSError(errno.EFBIG, f"more than {MAX_FILE_BYTES} bytes", str(path))
        return content


def read_text(path: Path) -> str:
    """A plain file's text; CheckpointError if it is absent, no plain file or not UTF-8."""
    try:
        return read_plain(path).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file.") from error
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error}.") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}; copy it again.") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping, empty for an empty file; CheckpointError if it is absent or broken."""
    try:
        contents = yaml.safe_load(read_text(path)) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        cause = " ".join(str(error).split())
        raise CheckpointError(f"{path} is not valid YAML: {cause}; copy it again.") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} holds {type(contents).__name__}, expected a mapping.")
    return contents


def read_json_value(path: Path) -> Any:
    """What a JSON file holds; CheckpointError if it is absent or broken."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; CheckpointError if it is absent or broken, or holds something else."""
    contents = read_json_value(path)
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} holds {type(contents).__name__}, expected a JSON object.")
    return contents


def record_of[T](kind: type[T], fields: Any) -> T:
    """The dataclass that a JSON object describes.

    Raises:
        TypeError: if `fields` is no object, or one is unknown, missing or of another type.
    """
    if not isinstance(fields, dict):
        raise TypeError(f"{type(fields).__name__}, expected an object")
    types = get_type_hints(kind)
    for name in fields.keys() & types.keys():
        try:
            check_type(
                fields[name],
                types[name],
                collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS,
            )
        except TypeCheckError as error:
            raise TypeError(f"{name!r} is {fields[name]!r:.80}: {error}") from error
    return kind(**fields)


def copy_without_code(source: Path, target: Path) -> None:
    """Copy a small file; of JSON the names of code to run (`auto_map`) stay behind.

    Raises:
        CheckpointError: if JSON is broken.
    """
    if source.suffix == ".json":
        contents = read_json(source)
        kept = {name: value for name, value in contents.items() if name not in CODE_FIELDS}
        if kept != contents:
            write_json(target, kept, sort_keys=False)
            return
    shutil.copyfile(source, target)


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The objects of a .jsonl file in order, and the numbers of the lines that hold none.

    A machine that was switched off leaves half a line, or a block of zero bytes.
    """
    rows, damaged = [], []
    text = read_plain(path).decode(errors="replace")
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            row = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            damaged.append(number)
        elif row:
            rows.append(row)
    return rows, damaged


def write_json(path: Path, contents: Any, *, sort_keys: bool = True) -> None:
    """Write a JSON file as transformers does: indented, sorted, with a final newline."""
    text = json.dumps(contents, indent=2, sort_keys=sort_keys, ensure_ascii=False)
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file; readers see the old one or the new one, never half of it."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` once the block ends without error.

    A reader sees the old file or the whole new one, also after a crash of the machine.
    """
    unfinished = unfinished_path(path)
    yield unfinished
    # On the disk before its name is: a crash may keep the rename and lose what was written.
    with unfinished.open("rb") as written:
        os.fsync(written.fileno())
    os.replace(unfinished, path)
