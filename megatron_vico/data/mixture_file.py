"""`mixture.json`: the folders of shards that are read as one data set, and how often each comes in an epoch."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from megatron_vico.errors import ConfigError

MIXTURE_NAME = "mixture.json"
MIXTURE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class MixtureFolder:
    """One folder of a mixture."""

    path: Path

    repeat: float = 1.0
    """How often it comes in an epoch (the official repeat_time); above 0."""


def read_mixture(path: str | Path) -> tuple[MixtureFolder, ...]:
    """The folders that a path stands for.

    Args:
        path: a folder of shards, a mixture.json, or a folder with one; paths in the file start from the file's folder.

    Returns:
        At least one folder, in order; whether they hold shards is not looked at.

    Raises:
        ConfigError: if there is nothing at `path`, or the file is no mixture.
    """
    place = Path(path)
    if not place.exists():
        raise ConfigError(f"{place}: no such file or folder; give a folder of shards or a {MIXTURE_NAME}.")
    if place.is_dir():
        if not (place / MIXTURE_NAME).exists():
            return (MixtureFolder(path=place),)
        place = place / MIXTURE_NAME
    try:
        content = json.loads(place.read_bytes())
        version = content["version"]
        folders = tuple(
            MixtureFolder(path=place.parent / each["path"], repeat=float(each.get("repeat", 1.0)))
            for each in content["folders"]
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'{place}: not a mixture ({error!r}); expected {{"version": {MIXTURE_VERSION}, "folders": [{{"path": '
            '"NAME", "repeat": 1.0}, ...]}.'
        ) from error
    if version != MIXTURE_VERSION:
        raise ConfigError(f"{place}: version {version!r}, expected {MIXTURE_VERSION}; make it anew.")
    wrong = [each for each in folders if not (each.repeat > 0 and math.isfinite(each.repeat))]
    if wrong or not folders:
        found = f"folder {wrong[0].path} with repeat {wrong[0].repeat}" if wrong else "no folder"
        raise ConfigError(f"{place}: {found}; expected at least one folder, each with a repeat above 0.")
    return folders
