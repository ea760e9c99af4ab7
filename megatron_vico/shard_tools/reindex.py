"""The index of a folder made again from its tar files, for another tokenizer or tiling."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from megatron_vico.data.encode.sample_encoder import EncodingSettings, SampleEncoder
from megatron_vico.data.encode.tokenizer import Tokenizer
from megatron_vico.data.shards.index import INDEX_NAME, FolderIndex, ShardFiles
from megatron_vico.data.shards.reader import parse_sample
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.files import open_plain
from megatron_vico.shard_tools.pool import Progress, run_tasks, with_progress
from megatron_vico.shard_tools.tar import indexed, members_of, write_index

NEW_INDEX = ".npz.new"
"""Suffix of a new index until all are there; then they take the place of the old ones."""


def index_shards(
    folder: str | Path,
    *,
    tokenizer: Tokenizer,
    settings: EncodingSettings,
    num_workers: int = 1,
    show_progress: bool = False,
) -> None:
    """Count a folder's tokens and tiles again, for another tokenizer or tiling.

    Its tar files stay as they are. An index that is missing or broken is made from them alone.

    Raises:
        ConfigError: if there are no shards, or a worker was killed.
        SampleError: if a tar file or a sample in it is broken.
    """
    path = Path(folder)
    files = sorted(path.glob("shard-*.tar"))
    if not files:
        raise ConfigError(f"{path}: no shard-*.tar in it; make the folder with `vico shards make`.")
    encoder = SampleEncoder(tokenizer=tokenizer, settings=settings)
    rebuild = partial(_rebuild_index, encoder)
    with run_tasks(rebuild, files, num_workers=num_workers) as results:
        rebuilt = with_progress(results, total=None, done=0, shown=show_progress)
        shards = {shard.name: shard for shard in rebuilt}
    skipped: tuple[str, ...] = ()
    if (path / INDEX_NAME).exists():
        try:
            skipped = FolderIndex.read(path).skipped
        except (SampleError, ConfigError):
            skipped = ()  # a broken index is the reason to make a new one
        # Interrupted from here on, the folder has no index and is refused, instead of being half
        # old and half new.
        (path / INDEX_NAME).unlink()
    for file in files:
        os.replace(file.with_suffix(NEW_INDEX), file.with_suffix(".npz"))
    FolderIndex(
        tokenizer=tokenizer.fingerprint,
        settings=settings,
        shards=tuple(shards[file.name] for file in files),
        skipped=skipped,
    ).write(path)


def _rebuild_index(encoder: SampleEncoder, path: Path) -> Iterator[ShardFiles | Progress]:
    """Read a tar file and write its index as `NAME.npz.new`."""
    samples = []
    with open_plain(path) as file:
        for key, members in members_of(path).items():
            parts = [os.pread(file.fileno(), size, offset) for offset, size in members]
            sample = parse_sample(parts[0], key=key, images=parts[1:], where=str(path))
            try:
                samples.append(indexed(encoder.encode_blank(sample), members=members))
            except SampleError as error:
                raise SampleError(f"{path}: {error}") from error
    shard = write_index(path, samples, index_path=path.with_suffix(NEW_INDEX))
    yield Progress(num_samples=shard.num_samples, num_bytes=shard.num_bytes)
    yield shard
