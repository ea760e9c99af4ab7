"""What is wrong with one shard: its hash, its index, its tar file's headers, its samples.

A shard is hashed first, and its bytes then come from the page cache and not from the disk again. No
problem ends it.
"""

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import UnidentifiedImageError

from megatron_vico.data.encode.sample_encoder import SampleEncoder
from megatron_vico.data.encode.tiling import decode_image
from megatron_vico.data.encode.tokenizer import Tokenizer
from megatron_vico.data.pack.packing import PackLimits
from megatron_vico.data.samples import ConversationSample
from megatron_vico.data.shards.index import FolderIndex, ShardFiles, ShardIndex, hash_of_file
from megatron_vico.data.shards.reader import ShardFolder
from megatron_vico.errors import SampleError
from megatron_vico.files import open_plain
from megatron_vico.shard_tools.pool import Progress
from megatron_vico.shard_tools.tar import ordered, read_headers

ProblemCause = Literal[
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


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong, and where."""

    cause: ProblemCause
    folder: str

    file: str = ""
    """In the folder; empty, the folder itself."""

    samples: str = ""
    """Key of the sample, or `first .. last` of neighbours; empty where it concerns no sample."""

    num_samples: int = 0
    """Samples that are concerned."""

    found: str
    expected: str

    def __str__(self) -> str:
        """One line."""
        where = f"{self.folder}/{self.file}" if self.file else self.folder
        one = self.num_samples == 1
        who = f"sample {self.samples}: " if one else f"{self.num_samples} samples, {self.samples}: "
        line = f"{where}: {who if self.samples else ''}{self.cause}: {self.found}"
        return " ".join(f"{line}; expected {self.expected}".split())


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """How closely to look."""

    tokenizer: Tokenizer | None = None
    """Encodes samples to compare their counts with the index; None, they are only decoded."""

    limits: PackLimits | None = None
    """What a pack holds; None, no sample is too large."""

    tokens_kept: int = 256
    """Visual tokens of a tile that is not compressed."""

    sample_share: float = 1.0
    """Share of the samples that are read, in [0, 1]; hashes and headers are checked of all."""

    num_workers: int = 0
    """Processes; 0 does all in this one."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One shard."""

    folder: Path
    index: FolderIndex
    """Lists this shard alone."""

    @property
    def shard(self) -> ShardFiles:
        """Its files."""
        return self.index.shards[0]

    @property
    def tar(self) -> Path:
        """Path of its tar file."""
        return self.folder / self.shard.name

    def problem(
        self,
        cause: ProblemCause,
        *,
        found: str,
        expected: str,
        keys: Sequence[str] = (),
        file: str | None = None,
    ) -> Problem:
        """A problem of the shard's tar file, unless `file` names another, and of samples `keys`."""
        return Problem(
            cause=cause,
            folder=str(self.folder),
            file=self.shard.name if file is None else file,
            samples=" .. ".join(dict.fromkeys((keys[0], keys[-1]))) if keys else "",
            num_samples=len(keys),
            found=found,
            expected=expected,
        )


def check_shard(options: VerifyOptions, job: Job) -> Iterator[Problem | Progress]:
    """Everything that is wrong with a shard."""
    try:
        index = yield from _check_index(job)
        if index is None:
            yield from _check_tar(job, ())
            yield Progress(num_samples=0, num_bytes=job.shard.num_bytes)
            return
        yield from _check_tar(job, [key.decode() for key in index.keys])
        lost = set(range(len(index)))
        if job.tar.exists():
            lost = yield from _check_members(job, index)
        if options.limits is not None:
            yield from _too_large(
                job, index, limits=options.limits, tokens_kept=options.tokens_kept
            )
        yield from _check_samples(job, index, options=options, lost=lost)
    except OSError as error:
        expected = "a file that can be read"
        yield job.problem("unreadable file", found=str(error), expected=expected)


def _check_index(job: Job) -> Generator[Problem, None, ShardIndex | None]:
    """Returns the index, or None where it cannot be used."""
    shard, path = job.shard, job.folder / job.shard.index_name
    cause: ProblemCause = "broken index"
    try:
        index = ShardIndex.read(path)
        found = "" if len(index) == shard.num_samples else f"{len(index)} samples"
    except SampleError as error:
        found = str(error)
        if not path.exists():
            cause, found = "missing file", "no such file"
    if found:
        expected = f"the index of {shard.num_samples} samples, which are lost without it"
        yield job.problem(cause, found=found, expected=expected, file=path.name)
        return None
    if hash_of_file(path) != shard.index_sha256:
        found, expected = "another sha256", "what was indexed"
        yield job.problem("changed content", found=found, expected=expected, file=path.name)
    return index


def _check_tar(job: Job, keys: Sequence[str]) -> Iterator[Problem]:
    shard = job.shard
    if not job.tar.exists():
        expected = f"{shard.num_bytes} bytes with {shard.num_samples} samples, which are lost"
        yield job.problem("missing file", found="no such file", expected=expected, keys=keys)
        return
    with open_plain(job.tar) as file:
        size = os.fstat(file.fileno()).st_size
    if size != shard.num_bytes:
        found, expected = f"{size} bytes", f"{shard.num_bytes} bytes"
        yield job.problem("wrong size", found=found, expected=expected)
    elif (sha256 := hash_of_file(job.tar)) != shard.sha256:
        expected = f"{shard.sha256[:16]}..., which was indexed"
        found = f"sha256 {sha256[:16]}..."
        yield job.problem("changed content", found=found, expected=expected)


def _check_members(job: Job, index: ShardIndex) -> Generator[Problem, None, set[int]]:
    """Compares the index with the tar file's headers; returns the samples that are lost."""
    size, headers = job.tar.stat().st_size, read_headers(job.tar)
    in_tar = {key: ordered(parts) for key, parts in headers.members.items()}
    lost: dict[int, tuple[ProblemCause, str, str]] = {}
    unlike: ProblemCause = "tar unlike index"
    listed = "what the index lists"
    without_header = []
    for number in range(len(index)):
        sample = index[number]
        there = in_tar.pop(sample.key, ())
        missing = set(sample.members) - set(there)
        if max(offset + length for offset, length in sample.members) > size:
            found = f"the file ends at byte {size}"
            lost[number] = ("sample cut off", found, "all of the sample")
        elif missing and set(there) < set(sample.members) and min(missing)[0] >= headers.end:
            without_header.append(sample.key)  # and still read: the index says where it lies
        elif not there:
            lost[number] = (unlike, "not among the tar file's members", listed)
        elif there != sample.members:
            lost[number] = (unlike, "members at other offsets or of other sizes", listed)
    if without_header:
        found = f"no header at byte {headers.end}"
        expected = "members in an unbroken row, as other readers need them"
        yield job.problem(unlike, found=found, expected=expected, keys=without_header)
    # What a cut leaves of the sample at the end is in both and was popped above.
    if in_tar:
        found, expected = "in the tar file, but not in the index", "samples of both"
        yield job.problem(unlike, found=found, expected=expected, keys=list(in_tar))
    for run in runs_of(sorted(lost), reason=lost.get):
        cause, found, expected = lost[run[0]]
        keys = [index[number].key for number in run]
        yield job.problem(cause, found=found, expected=expected, keys=keys)
    return set(lost)


def _too_large(
    job: Job, index: ShardIndex, *, limits: PackLimits, tokens_kept: int
) -> Iterator[Problem]:
    lengths, tiles = index.num_tokens + (tokens_kept - 1) * index.num_tiles, index.num_tiles
    is_too_large = (lengths > limits.capacity) | (tiles > limits.max_tiles)
    for number in np.flatnonzero(is_too_large).tolist():
        yield job.problem(
            "too large for a pack",
            found=f"{lengths[number]} tokens (uncompressed) and {tiles[number]} tiles",
            expected=f"at most {limits.capacity} and {limits.max_tiles}",
            keys=[index[number].key],
        )


def _check_samples(
    job: Job, index: ShardIndex, *, options: VerifyOptions, lost: set[int]
) -> Iterator[Problem | Progress]:
    folder = ShardFolder(job.folder, job.index, [index])
    encoder, tokenizer, share = None, options.tokenizer, options.sample_share
    if tokenizer is not None and tokenizer.fingerprint == job.index.tokenizer:
        encoder = SampleEncoder(tokenizer=tokenizer, settings=job.index.settings)
    done = 0
    for number in range(len(index)):
        if number in lost or int((number + 1) * share) == int(number * share):
            continue
        key = index[number].key
        for cause, found, expected in _check_sample(folder, number, encoder):
            yield job.problem(cause, found=found, expected=expected, keys=[key])
        end = max(offset + size for offset, size in index[number].members)
        yield Progress(num_samples=1, num_bytes=max(0, end - done))
        done = max(done, end)
    yield Progress(num_samples=0, num_bytes=job.shard.num_bytes - done)


def _check_sample(
    folder: ShardFolder, number: int, encoder: SampleEncoder | None
) -> Iterator[tuple[ProblemCause, str, str]]:
    """Cause, found, expected."""
    indexed = folder.describe(number)

    def what(error: SampleError) -> str:
        """The message without file and sample, which the problem names, and without the fix."""
        where = f"{folder.path}/{folder.index.shards[0].name}: "
        text = str(error).removeprefix(where).removeprefix(f"sample {indexed.key!r}: ")
        return text.rpartition("; ")[0] or text.rstrip(".")

    try:
        sample = folder.read(number)
    except SampleError as error:
        yield "unreadable sample", what(error), "JSON in the official chat format"
        return
    encoded, wrong_text = None, ""
    if encoder is not None:
        try:
            encoded = encoder.encode(sample)
        except SampleError as error:
            wrong_text = what(error)
    # An image is decoded once more only where its sample could not be encoded.
    broken = [] if encoded is not None else list(_image_errors(sample))
    for found in broken:
        yield "broken image", found, "an image"
    if wrong_text and not broken:
        yield "broken conversation", wrong_text, "one that can be trained"
    if encoded is not None:
        counts = (encoded.token_ids.size, encoded.labels.size, encoded.tiles_per_image)
        listed = (indexed.num_tokens, indexed.num_responses, indexed.tiles_per_image)
        if counts != listed:
            text = "{} tokens, {} trained, tiles {} by the {}"
            found, expected = text.format(*counts, "tokenizer"), text.format(*listed, "index")
            yield "wrong counts", found, expected


def _image_errors(sample: ConversationSample) -> Iterator[str]:
    for number, image in enumerate(sample.images):
        try:
            decode_image(image, key=sample.key, number=number)
        except SampleError as error:
            is_no_image = isinstance(error.__cause__, UnidentifiedImageError)
            reason = "no image file" if is_no_image else error.__cause__
            yield f"image {number} ({len(image)} bytes) cannot be decoded: {reason}"


def runs_of(numbers: Sequence[int], *, reason: Callable[[int], object]) -> Iterator[list[int]]:
    """Rising numbers, cut where there is a gap or their reason changes."""

    def run_of(item: tuple[int, int]) -> tuple[int, object]:
        return item[1] - item[0], reason(item[1])

    for _, run in groupby(enumerate(numbers), key=run_of):
        yield [number for _, number in run]
