"""Reads shards from the first byte to the last and says what is wrong where; it goes on after every
problem.

Each shard is hashed, its headers are compared with its index, and its samples are decoded, all in
one worker process: after the hash, a shard's bytes come from the page cache and not from the disk
again.
"""

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import UnidentifiedImageError
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from megatron_vico.data.encode.sample_encoder import SampleEncoder
from megatron_vico.data.encode.tiling import decode_image
from megatron_vico.data.encode.tokenizer import Tokenizer
from megatron_vico.data.load.worker_life import live_as_long_as_parent
from megatron_vico.data.pack.packing import PackLimits
from megatron_vico.data.samples import ConversationSample
from megatron_vico.data.shards.index import (
    INDEX_NAME,
    FolderIndex,
    ShardFiles,
    ShardIndex,
    hash_of_file,
)
from megatron_vico.data.shards.reader import ShardFolder
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.shard_tools.journal import MADE_NAME

Cause = Literal[
    "broken index",
    "missing file",
    "wrong size",
    "changed content",
    "unreadable file",
    "sample cut off",
    "tar unlike index",
    "unreadable sample",
    "broken image",
    "broken conversation",
    "wrong counts",
    "other tokenizer",
    "too large for a pack",
    "duplicate key",
    "file not listed",
]

PROGRESS_BYTES = 4 << 20
"""A worker reports after this many bytes, so that a bar moves within a shard."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong, and where."""

    cause: Cause
    folder: str

    file: str = ""
    """In the folder; empty, the folder itself."""

    samples: str = ""
    """Key of the sample, or `first .. last` of a run of neighbours; empty where it concerns no
    sample."""

    num_samples: int = 0
    """Samples that are concerned."""

    found: str
    expected: str

    def __str__(self) -> str:
        """One line."""
        place = f"{self.folder}/{self.file}" if self.file else self.folder
        who = (
            f"sample {self.samples}: "
            if self.num_samples == 1
            else f"{self.num_samples} samples, {self.samples}: "
        )
        line = (
            f"{place}: {who if self.samples else ''}{self.cause}: {self.found}; expected"
            f" {self.expected}"
        )
        return " ".join(line.split())


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """How closely to look."""

    tokenizer: Tokenizer | None = None
    """Encodes each sample and compares its counts with the index; None, samples are only parsed and
    decoded."""

    limits: PackLimits | None = None
    """What a pack holds; None, no sample is too large."""

    tokens_kept: int = 256
    """Visual tokens of a tile that is not compressed."""

    sample_share: float = 1.0
    """Share of the samples that are read, in [0, 1], spread evenly; hashes and headers are checked
    of all."""

    num_workers: int = 0
    """Processes; 0 does all in this one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Finding:
    """A part of the result."""

    problems: tuple[Problem, ...] = ()

    num_bytes: int = 0
    """Bytes of tar files done since the last one."""

    num_samples: int = 0
    """Samples read since the last one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Keys(Finding):
    """The keys of a whole shard, as hashes of 8 bytes: those of 100 million samples fit into
    memory."""

    job: int
    hashes: npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One shard."""

    folder: Path
    index: FolderIndex
    """Lists this shard alone."""

    @property
    def shard(self) -> ShardFiles:
        return self.index.shards[0]

    def problem(
        self,
        cause: Cause,
        *,
        found: str,
        expected: str,
        keys: Sequence[str] = (),
        file: str | None = None,
    ) -> Problem:
        return Problem(
            cause=cause,
            folder=str(self.folder),
            file=self.shard.name if file is None else file,
            samples=" .. ".join(dict.fromkeys((keys[0], keys[-1]))) if keys else "",
            num_samples=len(keys),
            found=found,
            expected=expected,
        )


class Verification:
    """What is to be verified; iterate over it for the findings."""

    def __init__(self, paths: Sequence[Path], options: VerifyOptions) -> None:
        """Read the folders' indexes.

        Args:
            paths: folders of shards; one that comes again is read once.
            options: how closely to look.

        Raises:
            ConfigError: if an option is out of range.
        """
        if not 0 <= options.sample_share <= 1:
            raise ConfigError(
                f"--sample-share {options.sample_share}: expected a share from 0 to 1."
            )
        if options.num_workers < 0:
            raise ConfigError(f"--workers {options.num_workers}: expected at least 0.")
        self.options = options
        self._problems: list[Problem] = []
        self._jobs: list[_Job] = []
        for path in dict.fromkeys(paths):
            self._add(path)

    @property
    def num_bytes(self) -> int:
        """Of all tar files, as the indexes say."""
        return sum(job.shard.num_bytes for job in self._jobs)

    @property
    def num_shards(self) -> int:
        """Of all folders."""
        return len(self._jobs)

    def __iter__(self) -> Iterator[Finding]:
        yield Finding(problems=tuple(self._problems))
        hashes: dict[int, npt.NDArray[np.uint64]] = {}
        shards = _Shards(self._jobs, self.options)
        workers = min(self.options.num_workers, len(self._jobs))
        for finding in DataLoader(
            shards, batch_size=None, num_workers=workers, worker_init_fn=live_as_long_as_parent
        ):
            if isinstance(finding, _Keys):
                hashes[finding.job] = finding.hashes
            else:
                yield finding
        yield Finding(problems=tuple(_duplicates(self._jobs, hashes)))

    def _add(self, path: Path) -> None:
        def note(cause: Cause, *, found: str, expected: str, file: str = "") -> None:
            self._problems.append(
                Problem(cause=cause, folder=str(path), file=file, found=found, expected=expected)
            )

        try:
            index = FolderIndex.read(path)
        except (ConfigError, SampleError, OSError) as error:
            note(
                "broken index",
                found=str(error),
                expected="a folder made by `vico shards make`",
                file=INDEX_NAME,
            )
            return
        tokenizer = self.options.tokenizer
        if tokenizer is not None and tokenizer.fingerprint != index.tokenizer:
            note(
                "other tokenizer",
                found=f"{tokenizer.source} is {tokenizer.fingerprint}",
                expected=(
                    f"{index.tokenizer}, which the index was made with (its counts are not"
                    " compared)"
                ),
            )
        known = {
            INDEX_NAME,
            MADE_NAME,
            *(name for shard in index.shards for name in (shard.name, shard.index_name)),
        }
        for name in sorted(entry.name for entry in path.iterdir() if entry.name not in known):
            note(
                "file not listed",
                found="a file that no shard needs",
                expected="only what the index lists",
                file=name,
            )
        self._jobs += [
            _Job(folder=path, index=replace(index, shards=(shard,), skipped=()))
            for shard in index.shards
        ]


class _Shards(IterableDataset[Finding]):
    """The findings of all shards, or of a worker's share of them."""

    def __init__(self, jobs: Sequence[_Job], options: VerifyOptions) -> None:
        self._jobs, self._options = tuple(jobs), options

    def __iter__(self) -> Iterator[Finding]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, len(self._jobs), step):
            check = _ShardCheck(job=self._jobs[number], options=self._options)
            try:
                yield from check.run(number)
            except OSError as error:
                found = check.job.problem(
                    "unreadable file", found=str(error), expected="a file that can be read"
                )
                yield Finding(problems=(found,))


@dataclass(kw_only=True)
class _ShardCheck:
    """All checks of one shard; those of its samples leave out what is known to be lost."""

    job: _Job
    options: VerifyOptions
    lost: dict[int, tuple[Cause, str, str]] = field(default_factory=dict)
    """Sample's number -> cause, found, expected."""

    def run(self, number: int) -> Iterator[Finding]:
        index = self._read_index()
        if isinstance(index, Problem):
            yield Finding(
                problems=(index, *self._check_tar(())), num_bytes=self.job.shard.num_bytes
            )
            return
        if hash_of_file(self.job.folder / self.job.shard.index_name) != self.job.shard.index_sha256:
            name = self.job.shard.index_name
            wrong = self.job.problem(
                "changed content", found="another sha256", expected="what was indexed", file=name
            )
            yield Finding(problems=(wrong,))
        yield _Keys(
            job=number, hashes=np.array([_hash(key) for key in index.keys], dtype=np.uint64)
        )
        problems = self._check_tar([key.decode() for key in index.keys])
        if (self.job.folder / self.job.shard.name).exists():
            problems += self._check_members(index)
            yield Finding(problems=(*problems, *self._lost_runs(index), *self._too_large(index)))
            yield from self._check_samples(index)
        else:
            yield Finding(
                problems=(*problems, *self._too_large(index)), num_bytes=self.job.shard.num_bytes
            )

    def _read_index(self) -> ShardIndex | Problem:
        shard, path = self.job.shard, self.job.folder / self.job.shard.index_name
        expected = f"the index of {shard.num_samples} samples, which are lost without it"
        if not path.exists():
            return self.job.problem(
                "missing file", found="no such file", expected=expected, file=path.name
            )
        try:
            index = ShardIndex.read(path)
        except SampleError as error:
            return self.job.problem(
                "broken index", found=str(error), expected=expected, file=path.name
            )
        if len(index) != shard.num_samples:
            return self.job.problem(
                "broken index", found=f"{len(index)} samples", expected=expected, file=path.name
            )
        return index

    def _check_tar(self, keys: Sequence[str]) -> list[Problem]:
        shard, path = self.job.shard, self.job.folder / self.job.shard.name
        if not path.exists():
            expected = f"{shard.num_bytes} bytes with {shard.num_samples} samples, which are lost"
            return [
                self.job.problem("missing file", found="no such file", expected=expected, keys=keys)
            ]
        size = path.stat().st_size
        if size != shard.num_bytes:
            return [
                self.job.problem(
                    "wrong size", found=f"{size} bytes", expected=f"{shard.num_bytes} bytes"
                )
            ]
        if (sha256 := hash_of_file(path)) != shard.sha256:
            found, expected = (
                f"sha256 {sha256[:16]}...",
                f"{shard.sha256[:16]}..., which was indexed",
            )
            return [self.job.problem("changed content", found=found, expected=expected)]
        return []

    def _check_members(self, index: ShardIndex) -> list[Problem]:
        """Compares the index with the tar file's headers; notes the samples that are lost."""
        path = self.job.folder / self.job.shard.name
        size, walk = path.stat().st_size, _walk(path)
        unwalked: list[str] = []
        for number in range(len(index)):
            sample = index[number]
            there = walk.members.pop(sample.key, ())
            missing = set(sample.members) - set(there)
            if max(offset + length for offset, length in sample.members) > size:
                self.lost[number] = (
                    "sample cut off",
                    f"the file ends at byte {size}",
                    "all of the sample",
                )
            elif missing and set(there) < set(sample.members) and min(missing)[0] >= walk.end:
                unwalked.append(sample.key)  # and still read: the index says where it lies
            elif not there:
                self.lost[number] = (
                    "tar unlike index",
                    "not among the tar file's members",
                    "what the index lists",
                )
            elif there != sample.members:
                found = "members at other offsets or of other sizes"
                self.lost[number] = ("tar unlike index", found, "what the index lists")
        problems = []
        if unwalked:
            found, expected = (
                f"no header at byte {walk.end}",
                "members in an unbroken row, as other readers need them",
            )
            problems.append(
                self.job.problem("tar unlike index", found=found, expected=expected, keys=unwalked)
            )
        # What a cut leaves of the sample at the end is in both and was popped above.
        if walk.members:
            found, keys = "in the tar file, but not in the index", list(walk.members)
            problems.append(
                self.job.problem(
                    "tar unlike index", found=found, expected="samples of both", keys=keys
                )
            )
        return problems

    def _lost_runs(self, index: ShardIndex) -> Iterator[Problem]:
        """One problem for each run of neighbours that are lost for the same reason."""

        def run_of(item: tuple[int, int]) -> tuple[int, tuple[Cause, str, str]]:
            return item[1] - item[0], self.lost[item[1]]

        for (_, (cause, found, expected)), items in groupby(
            enumerate(sorted(self.lost)), key=run_of
        ):
            keys = [index[number].key for _, number in items]
            yield self.job.problem(cause, found=found, expected=expected, keys=keys)

    def _too_large(self, index: ShardIndex) -> Iterator[Problem]:
        limits = self.options.limits
        if limits is None:
            return
        lengths = index.num_tokens + (self.options.tokens_kept - 1) * index.num_tiles
        for number in np.flatnonzero(
            (lengths > limits.capacity) | (index.num_tiles > limits.max_tiles)
        ).tolist():
            yield self.job.problem(
                "too large for a pack",
                found=(
                    f"{lengths[number]} tokens (uncompressed) and {index.num_tiles[number]} tiles"
                ),
                expected=f"at most {limits.capacity} and {limits.max_tiles}",
                keys=[index[number].key],
            )

    def _check_samples(self, index: ShardIndex) -> Iterator[Finding]:
        folder = ShardFolder(self.job.folder, self.job.index, [index])
        share = self.options.sample_share
        done = reported = num_samples = 0
        problems: list[Problem] = []
        for number in range(len(index)):
            if number in self.lost or int((number + 1) * share) == int(number * share):
                continue
            problems += self._check_sample(folder, number)
            num_samples += 1
            done = max(done, *(offset + size for offset, size in index[number].members))
            if done - reported >= PROGRESS_BYTES:
                yield Finding(
                    problems=tuple(problems), num_bytes=done - reported, num_samples=num_samples
                )
                problems, reported, num_samples = [], done, 0
        yield Finding(
            problems=tuple(problems),
            num_bytes=self.job.shard.num_bytes - reported,
            num_samples=num_samples,
        )

    def _check_sample(self, folder: ShardFolder, number: int) -> list[Problem]:
        indexed = folder.describe(number)

        def wrong(cause: Cause, found: str, expected: str) -> list[Problem]:
            return [self.job.problem(cause, found=found, expected=expected, keys=[indexed.key])]

        try:
            sample = folder.read(number)
        except SampleError as error:
            return wrong(
                "unreadable sample",
                _what(error, folder, indexed.key),
                "JSON in the official chat format",
            )
        if self._encoder is None:
            return [
                found
                for error in _image_errors(sample)
                for found in wrong("broken image", error, "an image")
            ]
        try:
            encoded = self._encoder.encode(sample)
        except SampleError as error:
            if images := [
                found
                for text in _image_errors(sample)
                for found in wrong("broken image", text, "an image")
            ]:
                return images
            return wrong(
                "broken conversation", _what(error, folder, indexed.key), "one that can be trained"
            )
        counts = (encoded.token_ids.size, encoded.labels.size, encoded.tiles_per_image)
        listed = (indexed.num_tokens, indexed.num_responses, indexed.tiles_per_image)
        if counts != listed:
            text = "{} tokens, {} trained, tiles {} by the {}"
            return wrong(
                "wrong counts", text.format(*counts, "tokenizer"), text.format(*listed, "index")
            )
        return []

    @cached_property
    def _encoder(self) -> SampleEncoder | None:
        tokenizer, index = self.options.tokenizer, self.job.index
        if tokenizer is None or tokenizer.fingerprint != index.tokenizer:
            return None
        return SampleEncoder(tokenizer=tokenizer, settings=index.settings)


@dataclass(frozen=True, kw_only=True)
class _Walk:
    """What a tar file's headers say."""

    members: dict[str, tuple[tuple[int, int], ...]]
    """(offset, size) of the JSON member and then of each image, by key."""

    end: int
    """Byte at which the headers end or cannot be read any more."""


def _walk(path: Path) -> _Walk:
    found: dict[str, dict[int, tuple[int, int]]] = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                place = suffix.partition(".")[0]
                # A member that is neither JSON nor a numbered image makes its sample unlike any
                # that the index has.
                number = (
                    -1
                    if suffix == "json"
                    else int(place)
                    if place.isdecimal()
                    else len(found) + (1 << 30)
                )
                found.setdefault(key, {})[number] = (member.offset_data, member.size)
                end = tar.offset
    except tarfile.TarError:
        pass  # its samples from here on are missing, and reported as such
    return _Walk(
        members={key: tuple(parts[n] for n in sorted(parts)) for key, parts in found.items()},
        end=end,
    )


def _image_errors(sample: ConversationSample) -> Iterator[str]:
    for number, image in enumerate(sample.images):
        try:
            decode_image(image, key=sample.key, number=number)
        except SampleError as error:
            reason = (
                "no image file"
                if isinstance(error.__cause__, UnidentifiedImageError)
                else error.__cause__
            )
            yield f"image {number} ({len(image)} bytes) cannot be decoded: {reason}"


def _what(error: SampleError, folder: ShardFolder, key: str) -> str:
    """The message without file and sample, which the problem names already, and without the fix."""
    text = (
        str(error)
        .removeprefix(f"{folder.path}/{folder.index.shards[0].name}: ")
        .removeprefix(f"sample {key!r}: ")
    )
    return text.rpartition("; ")[0] or text.rstrip(".")


def _hash(key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def _duplicates(
    jobs: Sequence[_Job], hashes: dict[int, npt.NDArray[np.uint64]]
) -> Iterator[Problem]:
    """One problem for each run of neighbours whose keys came before, in one other shard."""
    order = sorted(hashes)
    if not order:
        return
    together = np.concatenate([hashes[job] for job in order])
    owners = np.repeat(order, [len(hashes[job]) for job in order])
    values, counts = np.unique(together, return_counts=True)
    candidates = np.flatnonzero(np.isin(together, values[counts > 1]))
    starts = dict(
        zip(order, np.cumsum([0, *(len(hashes[job]) for job in order)]).tolist(), strict=False)
    )
    indexes: dict[int, ShardIndex] = {}
    first: dict[bytes, int] = {}
    again: list[tuple[int, int, int, str]] = []  # job of the first, job, place in all, key
    for place in candidates.tolist():
        job = int(owners[place])
        if job not in indexes:
            indexes[job] = ShardIndex.read(jobs[job].folder / jobs[job].shard.index_name)
        key = bytes(indexes[job].keys[place - starts[job]])
        if key in first:
            again.append((first[key], job, place, key.decode()))
        first.setdefault(key, job)
    for (origin, job, _), items in groupby(
        enumerate(again), key=lambda item: (item[1][0], item[1][1], item[1][2] - item[0])
    ):
        before = jobs[origin].folder / jobs[origin].shard.name
        keys = [key for _, (_, _, _, key) in items]
        yield jobs[job].problem(
            "duplicate key", found=f"also in {before}", expected="each key once", keys=keys
        )
