"""What is known of shards without opening them: where each sample lies, its tokens and tiles.

Each tar file has its index beside it (`shard-000000.tar`, `shard-000000.npz`), columns of numbers
that load in milliseconds; `index.json` lists the shards, with the hash of each file and the
settings that the numbers hold for.
"""

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import numpy.typing as npt

from megatron_vico.data.encode.sample_encoder import EncodingSettings
from megatron_vico.data.samples import IntArray
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.files import open_plain, read_plain, replacing, write_text

INDEX_NAME = "index.json"
INDEX_VERSION = 2
MAX_NUMBER = 1 << 48
"""Above every size, offset and count of an index."""

_SHARD_NAME, _SHA256 = re.compile(r"[^\x00-\x1f/]*\.tar"), re.compile(r"[0-9a-f]{64}")
_REBUILD = "rebuild it with `vico shards index`."


@dataclass(frozen=True, kw_only=True)
class IndexedSample:
    """One sample as its shard's index knows it."""

    key: str
    """Unique within the folder."""

    members: tuple[tuple[int, int], ...]
    """(offset, size) in the tar file of the JSON member and then of each image."""

    num_tokens: int
    """L, with one image token per tile."""

    num_responses: int
    """Trained tokens."""

    tiles_per_image: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardIndex:
    """The samples of one tar file, as columns; D samples, M members of which D are JSON."""

    keys: npt.NDArray[np.bytes_]
    """[D] UTF-8."""

    member_starts: IntArray
    """[D + 1], where a sample's members begin in `members`."""

    members: IntArray
    """[M, 2]: offset and size in bytes."""

    num_tokens: IntArray
    num_responses: IntArray
    tiles_per_image: IntArray
    """[M - D], over all images of all samples."""

    @classmethod
    def of(cls, samples: Sequence[IndexedSample]) -> "ShardIndex":
        """From its samples, in the tar file's order."""
        counts = [len(sample.members) for sample in samples]
        members = [member for sample in samples for member in sample.members]
        return cls(
            keys=np.array([sample.key.encode() for sample in samples], dtype=np.bytes_),
            member_starts=np.cumsum([0, *counts], dtype=np.int64),
            members=np.array(members, dtype=np.int64).reshape(-1, 2),
            num_tokens=np.array([sample.num_tokens for sample in samples], dtype=np.int64),
            num_responses=np.array([sample.num_responses for sample in samples], dtype=np.int64),
            tiles_per_image=np.array(
                [n for sample in samples for n in sample.tiles_per_image], dtype=np.int64
            ),
        )

    def __len__(self) -> int:
        return len(self.num_tokens)

    def __getitem__(self, number: int) -> IndexedSample:
        """Sample `number`, from 0."""
        start, end = int(self.member_starts[number]), int(self.member_starts[number + 1])
        return IndexedSample(
            key=self.keys[number].decode(),
            members=tuple((int(offset), int(size)) for offset, size in self.members[start:end]),
            num_tokens=int(self.num_tokens[number]),
            num_responses=int(self.num_responses[number]),
            # One member a sample, its JSON, is no image.
            tiles_per_image=tuple(self.tiles_per_image[start - number : end - number - 1].tolist()),
        )

    @property
    def num_tiles(self) -> IntArray:
        """[D], tiles of each sample."""
        sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.tiles_per_image)])
        return np.diff(sums[self.member_starts - np.arange(len(self) + 1)])

    @property
    def num_images(self) -> IntArray:
        """[D], images of each sample."""
        return np.diff(self.member_starts) - 1

    def _check_columns(self) -> None:
        num_samples, num_members = len(self), len(self.members)
        for name in self.__dataclass_fields__.keys() - {"keys"}:
            column = getattr(self, name)
            if column.dtype != np.int64 or column.ndim != (2 if name == "members" else 1):
                raise TypeError(f"{name} is {column.dtype} of {column.ndim} dimensions")
            if column.size and not 0 <= column.min() <= column.max() < MAX_NUMBER:
                raise ValueError(f"{name} has numbers out of range")
        if self.keys.dtype.kind != "S" or self.members.shape[1:] != (2,):
            raise TypeError("its keys are no bytes, or its members no pairs")
        b"\n".join(self.keys.tolist()).decode()
        columns = (self.keys, self.num_responses, self.member_starts, self.tiles_per_image)
        expected = [num_samples, num_samples, num_samples + 1, num_members - num_samples]
        ends = self.member_starts[[0, -1]].tolist()
        if (
            list(map(len, columns)) != expected
            or ends != [0, num_members]
            or (self.num_images < 0).any()
        ):
            raise ValueError("its columns do not fit together")

    def write(self, path: Path) -> None:
        """Write the file; the same content gives the same bytes."""
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            np.savez(file, **{name: getattr(self, name) for name in self.__dataclass_fields__})

    @classmethod
    def read(cls, path: Path) -> "ShardIndex":
        """Read the file; SampleError if it is missing or broken."""
        try:
            content = read_plain(path)
        except OSError as error:
            raise SampleError(f"{path}: cannot be read ({error}); {_REBUILD}") from error
        return cls.parse(content, where=str(path))

    @classmethod
    def parse(cls, content: bytes, *, where: str) -> "ShardIndex":
        """The content of such a file; `where` is its path or URL, for errors."""
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                # Ours are not compressed: a few bytes cannot become many.
                if sum(info.file_size for info in archive.infolist()) > len(content):
                    raise ValueError("compressed")
            with np.load(io.BytesIO(content), allow_pickle=False) as columns:
                index = cls(**{name: columns[name] for name in cls.__dataclass_fields__})
            index._check_columns()
        except Exception as error:  # a damaged zip file raises almost anything
            raise SampleError(f"{where}: broken index ({error!r}); {_REBUILD}") from error
        return index


@dataclass(frozen=True, kw_only=True)
class ShardFiles:
    """One shard as `index.json` lists it."""

    name: str
    """Of the tar file, within the folder."""

    num_bytes: int
    sha256: str
    num_samples: int
    """In the tar file, as are the two before."""

    index_sha256: str
    """Of the index beside it."""

    def __post_init__(self) -> None:
        """What a stranger's index.json says becomes names of files, here and in a cache.

        TypeError or ValueError for other types, no plain file name, no hash, a number below 0.
        """
        for name, expected in get_type_hints(ShardFiles).items():
            if type(getattr(self, name)) is not expected:
                raise TypeError(f"{name!r} of a shard is not of type {expected.__name__}")
        if Path(self.name).name != self.name or not _SHARD_NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is no plain file name")
        for sha256 in (self.sha256, self.index_sha256):
            if not _SHA256.fullmatch(sha256):
                raise ValueError(f"{sha256[:80]!r} is no hash of 64 hexadecimal digits")
        if min(self.num_bytes, self.num_samples) < 0:
            raise ValueError(f"{self.num_bytes} bytes, {self.num_samples} samples")

    @property
    def index_name(self) -> str:
        """Name of the index beside the tar file."""
        return Path(self.name).with_suffix(".npz").name


@dataclass(frozen=True, kw_only=True)
class FolderIndex:
    """Content of `index.json`."""

    version: int = INDEX_VERSION

    tokenizer: str
    """Fingerprint of the tokenizer that tokens were counted with."""

    settings: EncodingSettings
    """Tiling and tags that tokens and tiles were counted with."""

    shards: tuple[ShardFiles, ...]

    skipped: tuple[str, ...] = ()
    """One message for each sample left out."""

    @property
    def num_samples(self) -> int:
        """In all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Changes when any shard, its order, or what was counted in it does."""
        content = asdict(self) | {"skipped": ()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def write(self, folder: Path) -> None:
        """Write `index.json`."""
        write_text(folder / INDEX_NAME, json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, folder: Path) -> "FolderIndex":
        """Read `index.json`; ConfigError without one of this version, SampleError if broken."""
        path = folder / INDEX_NAME
        if not path.exists():
            raise ConfigError(
                f"{folder}: no {INDEX_NAME} there; make the folder with `vico shards make`."
            )
        try:
            content = read_plain(path)
        except OSError as error:
            raise SampleError(f"{path}: cannot be read ({error}); {_REBUILD}") from error
        return cls.parse(content, where=str(folder))

    @classmethod
    def parse(cls, content: bytes, *, where: str) -> "FolderIndex":
        """The content of `index.json`; `where` is the folder, for errors."""
        try:
            fields: dict[str, Any] = json.loads(content)
            version = fields["version"]
            if version != INDEX_VERSION:
                raise ConfigError(
                    f"{where}: index version {version}, expected {INDEX_VERSION}; {_REBUILD}"
                )
            fields["settings"] = EncodingSettings(**fields["settings"])
            fields["shards"] = tuple(ShardFiles(**shard) for shard in fields["shards"])
            fields["skipped"] = tuple(map(str, fields["skipped"]))
            if not fields["shards"]:
                raise KeyError("no shard")
            return cls(**fields)
        except ConfigError:
            raise
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            where = f"{where}/{INDEX_NAME}"
            raise SampleError(f"{where}: broken index ({error!r}); {_REBUILD}") from error


def hash_of_file(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
