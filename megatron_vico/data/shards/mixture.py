"""Which folders of shards a run reads and how often in an epoch: the words of `--data-path`."""

import json
import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vico.config.schema import DataOptions
from megatron_vico.data.shards.index import INDEX_NAME
from megatron_vico.data.shards.storage import SCHEMES, is_url, open_storage
from megatron_vico.errors import ConfigError

MIXTURE_NAME = "mixture.json"
MIXTURE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class MixedFolder:
    """One folder of a mixture."""

    path: str
    """A folder, or a URL."""

    repeat: float
    """How often its samples come in an epoch: the official `repeat_time`."""


def read_mixture(
    words: Sequence[str], *, flag: str = "--data-path", options: DataOptions | None = None
) -> tuple[MixedFolder, ...]:
    """The folders of a run.

    Args:
        words: folders, each with its repeat before it where it is not 1 (Megatron's blend syntax),
            and mixture files, whose own repeats are multiplied by the number before them.
        flag: that they were given to, for errors.
        options: which URLs a mixture file may name.

    Raises:
        ConfigError: if a number is not above 0 or has no folder after it, a folder comes twice or
            only holds folders of shards, or a mixture file cannot be read.
    """
    folders: list[MixedFolder] = []
    repeat = None
    for word in words:
        number = _number(word, flag=flag)
        if number is None:
            alone = (MixedFolder(path=word, repeat=1.0),)
            named = _read_file(word, options or DataOptions()) if word.endswith(".json") else alone
            factor = 1.0 if repeat is None else repeat
            folders += [MixedFolder(path=f.path, repeat=f.repeat * factor) for f in named]
        elif repeat is not None:
            raise ConfigError(
                f"{flag}: {word} comes after another number; give one number before each folder."
            )
        repeat = number
    if repeat is not None:
        raise ConfigError(f"{flag}: no folder after {words[-1]}; a number goes before its folder.")
    _check_folders(folders, flag=flag)
    return tuple(folders)


def _number(word: str, *, flag: str) -> float | None:
    try:
        number = float(word)
    except ValueError:
        return None
    if not 0 < number < math.inf:
        raise ConfigError(
            f"{flag}: a folder cannot come {word} times an epoch; give a number above 0, or leave"
            f" the folder out (a folder of that name is ./{word})."
        )
    return number


def _read_file(path: str, options: DataOptions) -> tuple[MixedFolder, ...]:
    """The folders of a mixture file, which are relative to it."""
    base = os.path.dirname(path)  # of a URL too
    try:
        content = json.loads(open_storage(base or ".", options).read(os.path.basename(path)))
        if content["version"] != MIXTURE_VERSION:
            raise ConfigError(
                f"{path}: mixture version {content['version']}, expected {MIXTURE_VERSION}; make it"
                " again with `vico shards make`."
            )
        listed = [(entry["path"], entry.get("repeat", 1)) for entry in content["folders"]]
    except ConfigError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f'{path}: cannot be read as a mixture ({error!r}); expected {{"version":'
            f' {MIXTURE_VERSION}, "folders": [{{"path": "NAME", "repeat": 0.5}}]}}.'
        ) from error
    for name, repeat in listed:
        _check_name(name, of=path, allowed={*SCHEMES, *options.data_url_schemes})
        if type(repeat) not in (int, float) or not 0 < repeat < math.inf:
            raise ConfigError(
                f"{path}: folder {name!r} has repeat {repeat!r}; expected a number above 0."
            )
    return tuple(
        MixedFolder(path=name if is_url(name) else os.path.join(base, name), repeat=float(repeat))
        for name, repeat in listed
    )


def _check_name(name: Any, *, of: str, allowed: Collection[str]) -> None:
    """A mixture may be a stranger's: it names folders beside it, or URLs of known schemes."""
    if isinstance(name, str) and is_url(name):
        for part in name.split("::"):  # fsspec's chains
            scheme = part.partition("://")[0]
            if scheme not in allowed:
                raise ConfigError(
                    f"{of}: folder {name!r}: scheme {scheme!r} is not among"
                    f" {', '.join(sorted(allowed))}; give --data-url-schemes {scheme} if you trust"
                    " it."
                )
        return
    plain = isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")
    if not plain or not name.isprintable():
        raise ConfigError(
            f"{of}: folder {name!r}; expected the name of a folder beside the file, or a URL. Give"
            " any other folder to --data-path itself, with its repeat before it."
        )


def _check_folders(folders: Sequence[MixedFolder], *, flag: str) -> None:
    seen: dict[str, str] = {}
    for folder in folders:
        path = folder.path
        same = path.rstrip("/") if is_url(path) else str(Path(path).resolve())
        if same in seen:
            raise ConfigError(
                f"{flag}: {path} is the same folder as {seen[same]}; give it once, with the sum of"
                " both numbers before it."
            )
        seen[same] = path
        mixture = Path(folder.path) / MIXTURE_NAME
        if mixture.is_file() and not mixture.with_name(INDEX_NAME).exists():
            raise ConfigError(
                f"{flag} {folder.path}: no shards, but a mixture of folders; did you mean"
                f" {mixture}?"
            )
