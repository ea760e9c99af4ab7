"""WebDataset tar shards with an index: any sample by its number, everything checked beforehand.

A folder holds `shard-000000.tar`, ... (members KEY.json, KEY.0.jpg, KEY.1.png, ..., or KEY.jpg, as
any WebDataset reader expects) and their indexes (index.py). Writing is in shard_tools/writer.py.
"""

import hashlib
import json
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_vico.config.registry import MAX_TILES
from megatron_vico.config.schema import DataOptions
from megatron_vico.data.encode.sample_encoder import EncodingSettings
from megatron_vico.data.encode.tokenizer import Tokenizer
from megatron_vico.data.records import MAX_LINE_BYTES, MAX_SAMPLE_BYTES
from megatron_vico.data.samples import ROLES, ConversationSample, IntArray, Turn
from megatron_vico.data.shards.index import (
    INDEX_NAME,
    FolderIndex,
    IndexedSample,
    ShardFiles,
    ShardIndex,
)
from megatron_vico.data.shards.storage import LocalStorage, Storage, is_url, open_storage
from megatron_vico.errors import ConfigError, SampleError, nearest

TAR_BLOCK_BYTES = tarfile.BLOCKSIZE
"""Of the header before each member."""

INDEX_THREADS = 16
PROGRESS_AFTER_S = 5.0


class ShardFolder:
    """A folder of shards, read by sample number; safe to fork and to pickle."""

    def __init__(
        self,
        path: Path | str,
        index: FolderIndex,
        shards: Sequence[ShardIndex],
        *,
        storage: Storage | None = None,
    ) -> None:
        """Take a folder that was checked (`open` checks one), local unless there is a storage."""
        self.path = path
        self.index = index
        self.num_tokens: IntArray = np.concatenate([shard.num_tokens for shard in shards])
        self.num_responses: IntArray = np.concatenate([shard.num_responses for shard in shards])
        self.num_tiles: IntArray = np.concatenate([shard.num_tiles for shard in shards])
        self.num_images: IntArray = np.concatenate([shard.num_images for shard in shards])
        self.samples_per_shard: tuple[int, ...] = tuple(len(shard) for shard in shards)
        self._shards = tuple(shards)
        self._shard_starts = np.cumsum([0, *self.samples_per_shard])
        self._storage = storage or LocalStorage(Path(path))

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        options: DataOptions | None = None,
    ) -> "ShardFolder":
        """Open a folder, or any URL of fsspec's, and check indexes by hashes, tar files by sizes.

        Raises:
            ConfigError: if this is no folder of shards, or there is no driver for the URL.
            SampleError: if a file is missing, cut short, or not the one that was indexed.
        """
        files = open_storage(path, options or DataOptions())
        try:
            content = files.read(INDEX_NAME)
        except FileNotFoundError as error:
            raise ConfigError(
                f"{path}: no {INDEX_NAME} there; make the folder with `vico shards make`."
            ) from error
        index = FolderIndex.parse(content, where=str(path))
        bar: dict[str, Any] = {"desc": f"open {path}", "delay": PROGRESS_AFTER_S, "leave": False}
        # Threads, because at a URL nearly all of the time is waiting.
        with ThreadPoolExecutor(INDEX_THREADS) as threads:
            opened = threads.map(lambda each: _open_shard(files, each), index.shards)
            shards = list(tqdm(opened, total=len(index.shards), **bar))
        return cls(path if is_url(path) else Path(path), index, shards, storage=files)

    def __len__(self) -> int:
        return int(self._shard_starts[-1])

    def find(self, key: str) -> int | None:
        """Number of the sample of that name; None without one."""
        for start, shard in zip(self._shard_starts.tolist(), self._shards, strict=False):
            found = np.flatnonzero(shard.keys == key.encode())
            if len(found):
                return start + int(found[0])
        return None

    def describe(self, number: int) -> IndexedSample:
        """What the index knows of a sample."""
        shard, local = self._locate(number)
        return self._shards[shard][local]

    def check_encoding(self, *, tokenizer: Tokenizer, settings: EncodingSettings) -> None:
        """Raise ConfigError unless the index counted with this tokenizer and these settings."""
        fix = (
            "rebuild the index with `vico shards index`, or train with the settings it was made"
            " with."
        )
        if self.index.tokenizer != tokenizer.fingerprint:
            raise ConfigError(
                f"{self.path}: indexed with tokenizer {self.index.tokenizer}, but --tokenizer-model"
                f" {tokenizer.source} is {tokenizer.fingerprint}; {fix}"
            )
        if self.index.settings != settings:
            raise ConfigError(
                f"{self.path}: indexed with {self.index.settings}, not {settings}; {fix}"
            )

    def read(self, number: int) -> ConversationSample:
        """Read sample `number`, from 0, with one access to the file.

        SampleError if the shard ends too early, or holds something else than the index says.
        """
        shard, local = self._locate(number)
        files, sample = self.index.shards[shard], self._shards[shard][local]
        where = self._storage.where(files.name)
        start = min(offset for offset, _ in sample.members) - TAR_BLOCK_BYTES
        end = max(offset + size for offset, size in sample.members)
        if end - start > MAX_SAMPLE_BYTES:
            raise SampleError(
                f"sample {sample.key!r}: its members lie over {end - start} bytes of {where},"
                f" expected at most {MAX_SAMPLE_BYTES}; write the tar file sample by sample."
            )
        try:
            content = self._storage.read_range(files, start, end)
            if len(content) != end - start:
                raise SampleError(
                    f"sample {sample.key!r}: {where} ends after {self._storage.size(files.name)}"
                    f" bytes, but the sample ends at {end}; the file was cut short: copy it again.",
                    cause="unreadable shard",
                )
        except FileNotFoundError as error:
            raise SampleError(
                f"sample {sample.key!r}: {where} is missing; restore it.", cause="unreadable shard"
            ) from error
        _check_header(content, sample, start=start, where=where)
        parts = [content[offset - start : offset - start + size] for offset, size in sample.members]
        return parse_sample(parts[0], key=sample.key, images=tuple(parts[1:]), where=where)

    def _locate(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of a folder of {len(self)} samples")
        shard = int(np.searchsorted(self._shard_starts, number, side="right")) - 1
        return shard, number - int(self._shard_starts[shard])


def _open_shard(files: Storage, shard: ShardFiles) -> ShardIndex:
    """A shard's index, once its files are those that `index.json` lists."""
    again = "copy it again, or rebuild the index with `vico shards index`."
    where = files.where(shard.name)
    try:
        size = files.size(shard.name)
        if size not in (None, shard.num_bytes):
            raise SampleError(
                f"{where}: {size} bytes, but the index says {shard.num_bytes}; "
                f"the file was cut short or replaced: {again}"
            )
        where = files.where(shard.index_name)
        content = files.read(shard.index_name)
    except FileNotFoundError as error:
        raise SampleError(
            f"{where}: missing, though {INDEX_NAME} lists it; restore it or make the shards again."
        ) from error
    if hashlib.sha256(content).hexdigest() != shard.index_sha256:
        raise SampleError(f"{where}: not the one that {INDEX_NAME} lists (sha256 differs); {again}")
    index = ShardIndex.parse(content, where=where)
    if len(index) != shard.num_samples:
        raise SampleError(
            f"{where}: {len(index)} samples, but {INDEX_NAME} says {shard.num_samples}; {again}"
        )
    if len(index) and index.members.sum(axis=1).max() > shard.num_bytes:
        raise SampleError(
            f"{where}: members beyond the {shard.num_bytes} bytes of {shard.name}; {again}"
        )
    return index


def _check_header(content: bytes, sample: IndexedSample, *, start: int, where: str) -> None:
    """Check that the JSON is where the index says; `content` is the tar file from `start` on."""
    offset, size = sample.members[0]
    header = content[offset - start - TAR_BLOCK_BYTES : offset - start]
    name = f"{sample.key}.json".encode()
    # Longer names and others than ASCII are cut or replaced here and stand in a header before it.
    is_plain = name.isascii() and len(name) <= tarfile.LENGTH_NAME - len("./")
    try:
        found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        own = found.name.removeprefix("./").encode(errors="surrogateescape")
        is_named = own == name or not is_plain
        is_same = found.size == size and is_named
    except tarfile.HeaderError:
        is_same = False
    if not is_same:
        raise SampleError(
            f"sample {sample.key!r}: {where} has another member at byte {offset}; the file is not"
            " the one that was indexed: copy it again, or rebuild the index with `vico shards"
            " index`.",
            cause="unreadable shard",
        )


def parse_sample(
    content: bytes, *, key: str, images: Sequence[bytes], where: str
) -> ConversationSample:
    """A sample from its JSON in the official chat format; SampleError if it is something else.

    That has `conversations`, a list of {"from": role, "value": text}; and, where the sample's data
    set sets them, `max_dynamic_patch` and `data_augment`. `where`, file and line, is for errors.
    """

    def wrong(what: str) -> SampleError:
        return SampleError(f"{where}: sample {key!r}: {what}")

    if len(content) > MAX_LINE_BYTES:
        raise wrong(f"more than {MAX_LINE_BYTES} bytes of JSON; shorten or remove the line.")
    try:
        record = json.loads(content)
        # Escapes may stand for half a character, which neither a tokenizer nor a file takes.
        json.dumps(record, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise wrong(f"broken JSON ({error}); correct or remove the line.") from error
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not turns:
        raise wrong("no list 'conversations'; expected the official chat format.")
    parsed = []
    for number, turn in enumerate(turns, start=1):
        fields = turn if isinstance(turn, dict) else {}
        role, text = fields.get("from"), fields.get("value")
        if role not in ROLES:
            known = f"expected one of {', '.join(ROLES)}{nearest(str(role), ROLES)}"
            raise wrong(f"turn {number} is from {role!r}, {known}.")
        if not isinstance(text, str):
            raise wrong(f"turn {number} has no text 'value'.")
        parsed.append(Turn(role, text))
    max_tiles, augment = record.get("max_dynamic_patch"), record.get("data_augment", False)
    if max_tiles is not None and (type(max_tiles) is not int or not 1 <= max_tiles <= MAX_TILES):
        raise wrong(
            f"'max_dynamic_patch' is {max_tiles!r}; expected a whole number from 1 to {MAX_TILES}."
        )
    if not isinstance(augment, bool):
        raise wrong(f"'data_augment' is {augment!r}; expected true or false.")
    return ConversationSample(
        key=key,
        turns=tuple(parsed),
        images=tuple(images),
        max_dynamic_patch=max_tiles,
        data_augment=augment,
    )


def sample_json(sample: ConversationSample) -> bytes:
    """The JSON member of a sample: what `parse_sample` reads, without what has its default."""
    record: dict[str, Any] = {
        "conversations": [{"from": turn.role, "value": turn.text} for turn in sample.turns]
    }
    if sample.max_dynamic_patch is not None:
        record["max_dynamic_patch"] = sample.max_dynamic_patch
    if sample.data_augment:
        record["data_augment"] = True
    return json.dumps(record, ensure_ascii=False).encode()
