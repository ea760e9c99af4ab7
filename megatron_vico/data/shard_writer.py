"""JSONL in the official chat format plus image files -> a folder of WebDataset shards with an index.

Every sample is encoded once while it is written, so that a broken one is found here and not in the middle of a run.
The folder appears under its name only when it is complete.
"""

import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import webdataset
from tqdm import tqdm

from megatron_vico.data.encoding import EncodingSettings, SampleEncoder
from megatron_vico.data.samples import ConversationSample, EncodedSample
from megatron_vico.data.shard_index import (
    INDEX_NAME,
    FolderIndex,
    IndexedSample,
    ShardFiles,
    ShardIndex,
    hash_of_file,
)
from megatron_vico.data.tokenizer import Tokenizer
from megatron_vico.data.webdataset import ShardFolder, parse_sample, sample_json
from megatron_vico.errors import ConfigError, SampleError


@dataclass(frozen=True, kw_only=True)
class WriterOptions:
    """How shards are cut, and what happens to broken samples."""

    samples_per_shard: int = 10_000
    """Most samples of a tar file."""

    max_shard_bytes: int = 1 << 30
    """A tar file is closed once it has this many bytes."""

    max_skipped: int = 0
    """Broken samples that may be left out, each logged in the index; one more is an error."""

    show_progress: bool = True
    """Show a progress bar."""


@dataclass(kw_only=True)
class _OpenShard:
    """A tar file being written, and what is known of its samples."""

    path: Path
    writer: Any
    num_bytes: int = 0
    samples: list[IndexedSample] = field(default_factory=list)

    def note(self, encoded: EncodedSample) -> None:
        self.samples.append(
            IndexedSample(
                key=encoded.key,
                members=(),  # known when the file is complete
                num_tokens=int(encoded.token_ids.size),
                num_responses=int(encoded.is_response.sum()),
                tiles_per_image=encoded.tiles_per_image,
            )
        )


def make_shards(
    jsonl: str | Path,
    *,
    image_root: str | Path,
    out_dir: str | Path,
    tokenizer: Tokenizer,
    settings: EncodingSettings,
    options: WriterOptions | None = None,
) -> FolderIndex:
    """Write a JSONL file and its images as shards.

    Args:
        jsonl: one sample a line: `conversations`, and `image` (a path or a list of paths) where it has any.
        image_root: folder that image paths start from.
        out_dir: folder to make; must not exist, or be empty.
        tokenizer: counts tokens.
        settings: tiling.
        options: sizes of shards and error budget.

    Returns:
        The index that was written.

    Raises:
        ConfigError: if `out_dir` is not empty or `jsonl` does not exist.
        SampleError: if more samples are broken than `options.max_skipped`; names file and line.
    """
    source, target, options = Path(jsonl), Path(out_dir), options or WriterOptions()
    if not source.is_file():
        raise ConfigError(f"{source}: no such file; expected a JSONL file in the official chat format.")
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target}: not empty; give a folder that does not exist, or remove its content.")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    encoder = SampleEncoder(tokenizer=tokenizer, settings=settings)
    try:
        shards, skipped = _write_shards(source, partial, Path(image_root), encoder, options)
        index = FolderIndex(
            tokenizer=tokenizer.fingerprint, settings=settings, shards=tuple(shards), skipped=tuple(skipped)
        )
        index.write(partial)
        os.replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return index


def index_shards(folder: str | Path, *, tokenizer: Tokenizer, settings: EncodingSettings) -> FolderIndex:
    """Count a folder's tokens and tiles anew, for another tokenizer or tiling; the tar files stay as they are.

    Args:
        folder: made by `make_shards`; an index that is missing or broken is made from the tar files alone.
        tokenizer: counts tokens.
        settings: tiling.

    Returns:
        The index that was written.

    Raises:
        SampleError: if a tar file or a sample in it is broken.
    """
    path = Path(folder)
    files = sorted(path.glob("shard-*.tar"))
    if not files:
        raise ConfigError(f"{path}: no shard-*.tar in it; make the folder with `vico shards make`.")
    encoder = SampleEncoder(tokenizer=tokenizer, settings=settings)
    shards = []
    for file in files:
        members = _members(file)
        samples = [
            IndexedSample(
                key=key, members=parts, num_tokens=0, num_responses=0, tiles_per_image=(0,) * (len(parts) - 1)
            )
            for key, parts in members.items()
        ]
        listed = ShardFiles(
            name=file.name, num_bytes=file.stat().st_size, sha256="", num_samples=len(samples), index_sha256=""
        )
        plain = FolderIndex(tokenizer=tokenizer.fingerprint, settings=settings, shards=(listed,))
        reader = ShardFolder(path, plain, [ShardIndex.of(samples)])
        shard = _OpenShard(path=file, writer=None)
        for number in range(len(reader)):
            shard.note(_encode(encoder, reader.read(number), str(file)))
        shards.append(_write_index(shard))
    skipped: tuple[str, ...] = ()
    if (path / INDEX_NAME).exists():
        try:
            skipped = FolderIndex.read(path).skipped
        except (SampleError, ConfigError):
            skipped = ()  # a broken index is the reason to make a new one
    index = FolderIndex(tokenizer=tokenizer.fingerprint, settings=settings, shards=tuple(shards), skipped=skipped)
    index.write(path)
    return index


def _write_shards(
    source: Path, folder: Path, image_root: Path, encoder: SampleEncoder, options: WriterOptions
) -> tuple[list[ShardFiles], list[str]]:
    """Write tar files; returns their indexes, and a message for each sample left out."""
    skipped: list[str] = []
    shards: list[ShardFiles] = []
    shard: _OpenShard | None = None
    for key, where, line in _lines(source, show_progress=options.show_progress):
        try:
            sample, suffixes = _read_line(line, key=key, where=where, image_root=image_root)
            encoded = _encode(encoder, sample, where)
        except SampleError as error:
            skipped.append(str(error))
            if len(skipped) > options.max_skipped:
                raise
            continue
        if shard is None:
            path = folder / f"shard-{len(shards):06d}.tar"
            # A fixed time stamp: the same input gives the same bytes, and so the same hash.
            shard = _OpenShard(path=path, writer=webdataset.TarWriter(str(path), encoder=False, mtime=0.0))
        _write_sample(shard, sample, suffixes)
        shard.note(encoded)
        if len(shard.samples) >= options.samples_per_shard or shard.num_bytes >= options.max_shard_bytes:
            shards.append(_close(shard))
            shard = None
    if shard is not None:
        shards.append(_close(shard))
    if not shards:
        raise SampleError(f"{source}: no sample in it that can be used; expected one JSON object a line.")
    return shards, skipped


def _lines(source: Path, *, show_progress: bool) -> Iterator[tuple[str, str, bytes]]:
    """(key, file:line, content) of each line that is not blank."""
    bar = tqdm(total=source.stat().st_size, unit="B", unit_scale=True, desc=source.name, disable=not show_progress)
    stem = source.stem.replace(".", "_")  # WebDataset takes what follows the first dot for the member's suffix
    with source.open("rb") as file, bar:
        for number, line in enumerate(file, start=1):
            bar.update(len(line))
            if line.strip():
                yield f"{stem}-{number:08d}", f"{source}:{number}", line


def _read_line(line: bytes, *, key: str, where: str, image_root: Path) -> tuple[ConversationSample, list[str]]:
    """A sample with its images' content, and the suffix of each image file."""
    sample = parse_sample(line, key=key, images=(), where=where)
    record = json.loads(line)
    if record.get("video"):
        raise SampleError(f"{where}: sample {key!r}: 'video' is not supported; give its frames as a list of images.")
    listed = record.get("image") or []
    names = [listed] if isinstance(listed, str) else listed
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise SampleError(f"{where}: sample {key!r}: 'image' is {listed!r}; expected a path or a list of paths.")
    images, suffixes = [], []
    for name in names:
        try:
            images.append((image_root / name).read_bytes())
        except OSError as error:
            raise SampleError(
                f"{where}: sample {key!r}: image {name!r} cannot be read under {image_root} ({error.strerror}); "
                "restore the file or remove the sample."
            ) from error
        suffixes.append(Path(name).suffix.lower().lstrip(".") or "img")
    return replace(sample, images=tuple(images)), suffixes


def _encode(encoder: SampleEncoder, sample: ConversationSample, where: str) -> EncodedSample:
    try:
        return encoder.encode(sample)
    except SampleError as error:
        raise SampleError(f"{where}: {error}") from error


def _write_sample(shard: _OpenShard, sample: ConversationSample, suffixes: list[str]) -> None:
    images = {
        f"{number}.{suffix}": image for number, (suffix, image) in enumerate(zip(suffixes, sample.images, strict=True))
    }
    shard.num_bytes += shard.writer.write({"__key__": sample.key, "json": sample_json(sample), **images})


def _close(shard: _OpenShard) -> ShardFiles:
    shard.writer.close()
    return _write_index(shard)


def _write_index(shard: _OpenShard) -> ShardFiles:
    members = _members(shard.path)
    assert list(members) == [sample.key for sample in shard.samples], "the tar file holds other samples"
    index_path = shard.path.with_suffix(".npz")
    ShardIndex.of([replace(sample, members=members[sample.key]) for sample in shard.samples]).write(index_path)
    return ShardFiles(
        name=shard.path.name,
        num_bytes=shard.path.stat().st_size,
        sha256=hash_of_file(shard.path),
        num_samples=len(shard.samples),
        index_sha256=hash_of_file(index_path),
    )


def _members(path: Path) -> dict[str, tuple[tuple[int, int], ...]]:
    """(offset, size) of the JSON member and then of each image in order, by key."""
    found: dict[str, dict[int, tuple[int, int]]] = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                number = -1 if suffix == "json" else int(suffix.split(".")[0])
                found.setdefault(key, {})[number] = (member.offset_data, member.size)
        if path.stat().st_size < max(offset + size for parts in found.values() for offset, size in parts.values()):
            raise tarfile.ReadError("unexpected end of data")
    except (tarfile.TarError, ValueError) as error:
        raise SampleError(f"{path}: not a complete tar file of samples ({error}); copy it again.") from error
    for key, parts in found.items():
        if sorted(parts) != list(range(-1, len(parts) - 1)):
            raise SampleError(f"{path}: sample {key!r} lacks its JSON or an image; copy the file again.")
    return {key: tuple(parts[number] for number in sorted(parts)) for key, parts in found.items()}
