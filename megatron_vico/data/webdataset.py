"""WebDataset tar shards with an index: read any sample by its number, check everything before training starts.

A folder holds `shard-000000.tar`, ... (members KEY.json, KEY.0.jpg, KEY.1.png, ..., as any WebDataset reader
expects) and `index.json`: where each member lies, and how long each sample is under the tokenizer and tiling that the
index was made with. Writing is in data/shard_writer.py.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_vico.data.encoding import EncodingSettings
from megatron_vico.data.samples import ROLES, ConversationSample, IntArray, Turn
from megatron_vico.data.tokenizer import Tokenizer
from megatron_vico.errors import ConfigError, SampleError, nearest

INDEX_NAME = "index.json"
INDEX_VERSION = 1
MAX_OPEN_FILES = 64


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The index of one tar file; all sequences have one entry per sample."""

    name: str
    """File name within the folder."""

    num_bytes: int
    """Size of the file."""

    sha256: str
    """Of the file."""

    keys: list[str]
    """Unique over the folder."""

    members: list[list[list[int]]]
    """[offset, size] in the file of the JSON member and then of each image."""

    num_tokens: list[int]
    """L, with one image token per tile."""

    num_responses: list[int]
    """Trained tokens."""

    tiles_per_image: list[list[int]]
    """Tiles of each image."""


@dataclass(frozen=True, kw_only=True)
class FolderIndex:
    """Content of `index.json`."""

    version: int
    """Of this format."""

    tokenizer: str
    """Fingerprint of the tokenizer that `num_tokens` was counted with."""

    settings: EncodingSettings
    """Tiling and tags that `num_tokens` and `tiles_per_image` were counted with."""

    shards: list[ShardIndex]
    """In order."""

    skipped: list[str]
    """One message for each sample left out."""

    def write(self, folder: Path) -> None:
        """Write `index.json` so that a reader sees the old file or the new one, never half of it."""
        temporary = folder / (INDEX_NAME + ".partial")
        temporary.write_text(json.dumps(asdict(self), separators=(",", ":")))
        os.replace(temporary, folder / INDEX_NAME)

    @classmethod
    def read(cls, folder: Path) -> "FolderIndex":
        """Read and check `index.json`.

        Raises:
            ConfigError: if there is none, or it is of another version.
            SampleError: if it is broken.
        """
        path = folder / INDEX_NAME
        if not path.exists():
            raise ConfigError(f"--data-path {folder}: no {INDEX_NAME} there; make the folder with `vico shards make`.")
        try:
            content: dict[str, Any] = json.loads(path.read_text())
            version = content["version"]
            if version != INDEX_VERSION:
                raise ConfigError(
                    f"--data-path {folder}: index version {version}, expected {INDEX_VERSION}; "
                    "make it anew with `vico shards index`."
                )
            content["settings"] = EncodingSettings(**content["settings"])
            content["shards"] = [ShardIndex(**shard) for shard in content["shards"]]
            return cls(**content)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise SampleError(f"{path}: broken index ({error!r}); make it anew with `vico shards index`.") from error


class ShardFolder:
    """A folder of shards, read by sample number; safe to fork and to pickle."""

    def __init__(self, path: Path, index: FolderIndex) -> None:
        """Args: path: the folder; index: its index, already checked (use `open`)."""
        self.path = path
        self.index = index
        shards = index.shards
        self.keys: list[str] = [key for shard in shards for key in shard.keys]
        self.num_tokens = _flat([shard.num_tokens for shard in shards])
        self.num_responses = _flat([shard.num_responses for shard in shards])
        self.num_tiles: IntArray = np.array(
            [sum(tiles) for shard in shards for tiles in shard.tiles_per_image], dtype=np.int64
        )
        self._shard_starts = np.cumsum([0] + [len(shard.keys) for shard in shards])
        self._files: dict[int, int] = {}

    @classmethod
    def open(cls, path: str | Path, *, verify: Literal["size", "sha256"] = "size") -> "ShardFolder":
        """Open a folder and check its files.

        Args:
            path: the folder.
            verify: compare each file's size, or read all of it and compare its hash.

        Returns:
            The folder.

        Raises:
            ConfigError: if this is no folder of shards.
            SampleError: if a file is missing, cut short, or not the one that was indexed.
        """
        folder = Path(path)
        index = FolderIndex.read(folder)
        for shard in index.shards:
            file = folder / shard.name
            if not file.exists():
                raise SampleError(f"{file}: missing, though {INDEX_NAME} lists it; restore it or make the shards anew.")
            size = file.stat().st_size
            if size != shard.num_bytes:
                raise SampleError(
                    f"{file}: {size} bytes, but the index says {shard.num_bytes}; the file was cut short or replaced: "
                    "copy it again, or make the index anew with `vico shards index`."
                )
            if verify == "sha256" and hash_of_file(file) != shard.sha256:
                raise SampleError(f"{file}: its content is not what was indexed (sha256 differs); copy it again.")
        return cls(folder, index)

    def __len__(self) -> int:
        return len(self.keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def tiles_per_image(self, number: int) -> list[int]:
        """Tiles of each image of a sample, as indexed."""
        shard, local = self._locate(number)
        return self.index.shards[shard].tiles_per_image[local]

    def check_encoding(self, *, tokenizer: Tokenizer, settings: EncodingSettings) -> None:
        """Check that the index counted with this tokenizer and these settings.

        Raises:
            ConfigError: if not; names both.
        """
        fix = "make the index anew with `vico shards index`, or train with the settings it was made with."
        if self.index.tokenizer != tokenizer.fingerprint:
            raise ConfigError(
                f"--data-path {self.path}: indexed with tokenizer {self.index.tokenizer}, but --tokenizer-model "
                f"{tokenizer.source} is {tokenizer.fingerprint}; {fix}"
            )
        if self.index.settings != settings:
            raise ConfigError(f"--data-path {self.path}: indexed with {self.index.settings}, not {settings}; {fix}")

    def read(self, number: int) -> ConversationSample:
        """Read one sample with one access to the file.

        Args:
            number: of the sample, from 0.

        Returns:
            The sample.

        Raises:
            SampleError: if the shard ends too early, or holds something else than the index says.
        """
        shard, local = self._locate(number)
        listed = self.index.shards[shard]
        key, members = listed.keys[local], listed.members[local]
        start = min(offset for offset, _ in members)
        end = max(offset + size for offset, size in members)
        file = self._file(shard)
        content = os.pread(file, end - start, start)
        if len(content) != end - start:
            raise SampleError(
                f"sample {key!r}: {self.path / listed.name} ends after {os.fstat(file).st_size} bytes, but the sample "
                f"ends at {end}; the file was cut short: copy it again."
            )
        parts = [content[offset - start : offset - start + size] for offset, size in members]
        return parse_sample(parts[0], key=key, images=tuple(parts[1:]), where=str(self.path / listed.name))

    def _locate(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of a folder of {len(self)} samples")
        shard = int(np.searchsorted(self._shard_starts, number, side="right")) - 1
        return shard, number - int(self._shard_starts[shard])

    def _file(self, shard: int) -> int:
        """An open file descriptor; the one opened first is closed when there are too many."""
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self.path / self.index.shards[shard].name, os.O_RDONLY)
        return self._files[shard]

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)


def parse_sample(content: bytes, *, key: str, images: Sequence[bytes], where: str) -> ConversationSample:
    """A sample from its JSON in the official chat format.

    Args:
        content: JSON with `conversations`: a list of {"from": role, "value": text}.
        key: the sample's name.
        images: its encoded image files.
        where: file (and line) for errors.

    Returns:
        The sample.

    Raises:
        SampleError: if the JSON is broken or not a conversation.
    """
    try:
        record = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SampleError(f"{where}: sample {key!r}: broken JSON ({error}); correct or remove the line.") from error
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not turns:
        raise SampleError(f"{where}: sample {key!r}: no list 'conversations'; expected the official chat format.")
    parsed = []
    for number, turn in enumerate(turns):
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if role not in ROLES:
            raise SampleError(
                f"{where}: sample {key!r}: turn {number + 1} is from {role!r}, expected one of {', '.join(ROLES)}"
                f"{nearest(str(role), ROLES)}."
            )
        if not isinstance(text, str):
            raise SampleError(f"{where}: sample {key!r}: turn {number + 1} has no text 'value'.")
        parsed.append(Turn(role, text))
    return ConversationSample(key=key, turns=tuple(parsed), images=tuple(images))


def hash_of_file(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flat(lists: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
    return np.array([value for values in lists for value in values], dtype=np.int64)
