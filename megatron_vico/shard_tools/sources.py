"""Where samples come from: a JSONL file and its media, or the official meta JSON's data sets."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vico.config.registry import MAX_TILES
from megatron_vico.data.records import check_lines
from megatron_vico.errors import ConfigError, nearest
from megatron_vico.files import INCOMPLETE_SUFFIX, read_plain


@dataclass(frozen=True, kw_only=True)
class Source:
    """One data set: its conversations and media, and what the official meta JSON says of it."""

    name: str
    """Of the data set; its samples' keys are `NAME-LINE`, a dot in the name written as `_`."""

    annotation: Path
    """JSONL, one sample a line: `conversations`; `image` (one path or more) or `video` (a path)."""

    root: Path
    """What paths of media start from: a folder, or a tar file of images."""

    repeat: float = 1.0
    """How often the data set comes in an epoch (`repeat_time`)."""

    data_augment: bool = False
    """Whether its tiles go through JPEG compression when they are trained."""

    max_dynamic_patch: int | None = None
    """Most tiles of an image; None, the run's."""

    length: int | None = None
    """How many lines the meta JSON says it has."""

    @property
    def stem(self) -> str:
        """What keys start with; after a key's first dot comes the member's suffix in WebDataset."""
        return self.name.replace(".", "_")

    def check(self) -> None:
        """Raise ConfigError unless annotation and root are there."""
        check_lines(self.annotation, flag="annotation")
        if not (self.root.is_dir() or (self.root.is_file() and self.root.suffix == ".tar")):
            raise ConfigError(
                f"{self.root}: neither a folder nor a .tar file, though paths in {self.annotation}"
                " start from it; correct the path, or unpack or decompress the archive."
            )


# The official fields; `root` and `annotation` first, since data sets without them say nothing.
_META_TYPES: dict[str, tuple[type, ...]] = {
    "root": (str,),
    "annotation": (str,),
    "data_augment": (bool,),
    "repeat_time": (int, float),
    "length": (int,),
    "max_dynamic_patch": (int,),
}


def read_meta(path: str | Path) -> tuple[Source, ...]:
    """Read the official meta JSON, {name: {root, annotation, data_augment, repeat_time, ...}}.

    Relative paths in it start from the working directory, as in the official code. Only
    `annotation` is needed; an empty `root` is its folder. ConfigError, naming data set and field,
    if one is wrong.
    """
    meta = Path(path)
    try:
        content = json.loads(read_plain(meta), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"--meta {meta}: cannot be read ({error}); expected the official meta JSON."
        ) from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(
            f"--meta {meta}: expected {{name: {{root, annotation, ...}}}} with at least one data"
            " set."
        )
    sources = []
    for name, fields in content.items():
        sources.append(_source(name, fields, where=f"--meta {meta}: data set {name!r}"))
        sources[-1].check()
    stems = [source.stem for source in sources]
    for source in sources:
        if stems.count(source.stem) > 1:
            raise ConfigError(
                f"--meta {meta}: several data sets whose keys start with {source.stem!r}; rename"
                " one."
            )
    return tuple(sources)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"several entries {max(names, key=names.count)!r}")
    return dict(pairs)


def _source(name: str, fields: Any, *, where: str) -> Source:
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: {fields!r}; expected an object with {', '.join(_META_TYPES)}.")
    is_path = not name or Path(name).name != name or name.startswith(".")
    if is_path or name.endswith((INCOMPLETE_SUFFIX, ".json")):
        raise ConfigError(
            f"{where}: a folder gets this name; use one without '/', a dot first, or"
            f" '{INCOMPLETE_SUFFIX}' or '.json' last."
        )
    for field, value in fields.items():
        if field not in _META_TYPES:
            raise ConfigError(f"{where}: unknown field {field!r}{nearest(field, _META_TYPES)}.")
        types = _META_TYPES[field]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            expected = " or ".join(each.__name__ for each in types)
            raise ConfigError(f"{where}: {field} is {value!r}; expected {expected}.")
    if not fields.get("annotation"):
        raise ConfigError(f"{where}: no annotation; give the path of its JSONL file.")
    repeat, max_tiles = fields.get("repeat_time", 1), fields.get("max_dynamic_patch")
    if not 0 < repeat < float("inf"):
        raise ConfigError(
            f"{where}: repeat_time is {repeat}; expected a number above 0, or remove the data set."
        )
    if max_tiles is not None and not 1 <= max_tiles <= MAX_TILES:
        raise ConfigError(f"{where}: max_dynamic_patch is {max_tiles}; expected 1 to {MAX_TILES}.")
    annotation = Path(fields["annotation"])
    return Source(
        name=name,
        annotation=annotation,
        root=Path(fields["root"]) if fields.get("root") else annotation.parent,
        repeat=float(repeat),
        data_augment=fields.get("data_augment", False),
        max_dynamic_patch=max_tiles,
        length=fields.get("length"),
    )
