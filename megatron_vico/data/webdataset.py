"""WebDataset tar shards with an index: read any sample by its number, check everything before training starts.

A folder holds `shard-000000.tar`, ... (members KEY.json, KEY.0.jpg, KEY.1.png, ..., as any WebDataset reader
expects) and their indexes (data/shard_index.py). Writing is in data/shard_writer.py.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_vico.data.encoding import EncodingSettings
from megatron_vico.data.samples import ROLES, ConversationSample, IntArray, Turn
from megatron_vico.data.shard_index import INDEX_NAME, FolderIndex, IndexedSample, ShardFiles, ShardIndex, hash_of_file
from megatron_vico.data.tokenizer import Tokenizer
from megatron_vico.errors import ConfigError, SampleError, nearest

MAX_OPEN_FILES = 64


class ShardFolder:
    """A folder of shards, read by sample number; safe to fork and to pickle."""

    def __init__(self, path: Path, index: FolderIndex, shards: Sequence[ShardIndex]) -> None:
        """Args: path: the folder; index, shards: its index and those of its shards, already checked (use `open`)."""
        self.path = path
        self.index = index
        self.num_tokens: IntArray = np.concatenate([shard.num_tokens for shard in shards])
        self.num_responses: IntArray = np.concatenate([shard.num_responses for shard in shards])
        self.num_tiles: IntArray = np.concatenate([shard.num_tiles for shard in shards])
        self.samples_per_shard: tuple[int, ...] = tuple(len(shard) for shard in shards)
        self._shards = tuple(shards)
        self._shard_starts = np.cumsum([0, *self.samples_per_shard])
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
        return cls(folder, index, [_open_index(folder, shard) for shard in index.shards])

    def __len__(self) -> int:
        return int(self._shard_starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def describe(self, number: int) -> IndexedSample:
        """What the index knows of a sample."""
        shard, local = self._locate(number)
        return self._shards[shard][local]

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
        name, sample = self.index.shards[shard].name, self._shards[shard][local]
        key, members = sample.key, sample.members
        start = min(offset for offset, _ in members)
        end = max(offset + size for offset, size in members)
        file = self._file(shard)
        content = os.pread(file, end - start, start)
        if len(content) != end - start:
            raise SampleError(
                f"sample {key!r}: {self.path / name} ends after {os.fstat(file).st_size} bytes, but the sample "
                f"ends at {end}; the file was cut short: copy it again.",
                cause="unreadable shard",
            )
        parts = [content[offset - start : offset - start + size] for offset, size in members]
        return parse_sample(parts[0], key=key, images=tuple(parts[1:]), where=str(self.path / name))

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


def _open_index(folder: Path, shard: ShardFiles) -> ShardIndex:
    index = ShardIndex.read(folder / shard.index_name)
    if len(index) != shard.num_samples:
        raise SampleError(
            f"{folder / shard.index_name}: {len(index)} samples, but {INDEX_NAME} says {shard.num_samples}; copy the "
            "folder again, or make the index anew with `vico shards index`."
        )
    return index


def parse_sample(content: bytes, *, key: str, images: Sequence[bytes], where: str) -> ConversationSample:
    """A sample from its JSON in the official chat format.

    Args:
        content: JSON with `conversations`: a list of {"from": role, "value": text}; and, where the sample's data set
            sets them, `max_dynamic_patch` and `data_augment`.
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
        # Escapes may stand for half a character, which neither a tokenizer nor a file takes.
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
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
    most, augment = record.get("max_dynamic_patch"), record.get("data_augment", False)
    if most is not None and (type(most) is not int or most < 1):
        raise SampleError(f"{where}: sample {key!r}: 'max_dynamic_patch' is {most!r}; expected a whole number from 1.")
    if not isinstance(augment, bool):
        raise SampleError(f"{where}: sample {key!r}: 'data_augment' is {augment!r}; expected true or false.")
    return ConversationSample(
        key=key, turns=tuple(parsed), images=tuple(images), max_dynamic_patch=most, data_augment=augment
    )


def sample_json(sample: ConversationSample) -> bytes:
    """The JSON member of a sample in a shard: what `parse_sample` reads, without what has its default."""
    record: dict[str, Any] = {"conversations": [{"from": turn.role, "value": turn.text} for turn in sample.turns]}
    if sample.max_dynamic_patch is not None:
        record["max_dynamic_patch"] = sample.max_dynamic_patch
    if sample.data_augment:
        record["data_augment"] = True
    return json.dumps(record, ensure_ascii=False).encode()
