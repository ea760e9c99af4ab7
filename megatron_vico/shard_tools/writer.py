"""Data sets in the official chat format -> folders of WebDataset shards; goes on after a kill.

What is in a shard depends on the input alone: a fixed run of lines becomes one, or several if it
has too many bytes. Every sample is decoded and encoded while it is written, so that a broken one is
found here and not in the middle of a run. The folder appears under its name only when it is
complete.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from megatron_vico.data.encode.sample_encoder import EncodingSettings, SampleEncoder
from megatron_vico.data.encode.tokenizer import Tokenizer
from megatron_vico.data.shards.index import FolderIndex, ShardFiles
from megatron_vico.data.shards.mixture import MIXTURE_NAME, MIXTURE_VERSION
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.files import write_text
from megatron_vico.shard_tools.lines import LineRun, read_lines
from megatron_vico.shard_tools.made_folder import FinishedRun, MadeFolder
from megatron_vico.shard_tools.options import WriterOptions
from megatron_vico.shard_tools.pool import Progress, run_tasks, with_progress
from megatron_vico.shard_tools.sample_reader import SampleReader
from megatron_vico.shard_tools.sources import Source, read_meta
from megatron_vico.shard_tools.tar import ShardWriter

NUM_SHOWN = 5
"""Broken samples that an error shows."""


def make_shards(
    jsonl: str | Path,
    *,
    image_root: str | Path,
    out_dir: str | Path,
    tokenizer: Tokenizer,
    settings: EncodingSettings,
    options: WriterOptions | None = None,
) -> FolderIndex:
    """Write a JSONL file and its media as shards; given again after an interruption, go on.

    Args:
        jsonl: see `Source.annotation`.
        image_root: see `Source.root`.
        out_dir: folder to make; must not exist, be empty, or be made by the same call.

    Raises:
        ConfigError: if `out_dir` holds something else or cannot be written, a source does not
            exist, or a worker was killed.
        SampleError: if more samples are broken than `options` allow; names cause, file and line.
    """
    source = Source(name=Path(jsonl).stem, annotation=Path(jsonl), root=Path(image_root))
    source.check()
    encoder = SampleEncoder(tokenizer=tokenizer, settings=settings)
    with _disk_errors_explained(out_dir):
        made = _make_folders([(source, Path(out_dir))], encoder, options or WriterOptions())
    return made[0].complete()


def make_mixture(
    meta: str | Path,
    *,
    out_dir: str | Path,
    tokenizer: Tokenizer,
    settings: EncodingSettings,
    options: WriterOptions | None = None,
) -> tuple[MadeFolder, ...]:
    """Write every data set of an official meta JSON, and `mixture.json` that lists the folders.

    See `read_meta` for the file, and `make_shards` for the rest and for errors; the error budget is
    one for all. `out_dir` gets a folder for each data set, under its name, in the file's order.
    """
    out = Path(out_dir)
    encoder = SampleEncoder(tokenizer=tokenizer, settings=settings)
    targets = [(source, out / source.name) for source in read_meta(meta)]
    with _disk_errors_explained(out):
        made = _make_folders(targets, encoder, options or WriterOptions())
        folders = [{"path": folder.source.name, "repeat": folder.source.repeat} for folder in made]
        mixture = {"version": MIXTURE_VERSION, "folders": folders}
        write_text(out / MIXTURE_NAME, json.dumps(mixture, indent=1))
    return made


def table_of_causes(skipped: Sequence[str]) -> str:
    """How many samples were left out for which cause, a line each."""
    causes = Counter(message.partition(": ")[0] for message in skipped).most_common()
    return "\n".join(f"  {cause:20} {count:>10}" for cause, count in causes)


def _make_folders(
    targets: Sequence[tuple[Source, Path]], encoder: SampleEncoder, options: WriterOptions
) -> tuple[MadeFolder, ...]:
    """Write all folders with one set of workers."""
    folders: dict[str, MadeFolder] = {}
    try:
        for source, target in targets:
            folders[source.name] = MadeFolder(source, target, encoder=encoder, options=options)
        num_samples = sum(folder.plan.num_samples for folder in folders.values())
        skip_limit = options.skip_limit(num_samples)
        tasks = [
            (folder.source, folder.unfinished, run)
            for folder in folders.values()
            for run in folder.missing_runs()
        ]
        _check_budget(folders, (), skip_limit=skip_limit)
        reader = SampleReader(encoder=encoder, options=options)
        write = partial(
            _write_run, reader, max_shard_bytes=options.max_shard_bytes, skip_limit=skip_limit
        )
        workers, kept = options.num_workers, "finished work is kept: "
        done = num_samples - sum(run.num_samples for *_, run in tasks)
        shown = options.show_progress
        with run_tasks(write, tasks, num_workers=workers, kept=kept) as results:
            for made in with_progress(results, total=num_samples, done=done, shown=shown):
                if made.skipped:
                    _check_budget(folders, made.skipped, skip_limit=skip_limit)
                folders[made.name].add(made)
        for folder in folders.values():
            folder.complete()
        return tuple(folders.values())
    finally:
        for folder in folders.values():
            folder.close()


@contextmanager
def _disk_errors_explained(out: str | Path) -> Iterator[None]:
    """All but what cannot be read of a sample's media, which is the sample's error: a full disk."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{out}: {error}; make room or correct the rights, and give the same command again:"
            " finished work is kept."
        ) from error


def _check_budget(folders: dict[str, MadeFolder], news: Sequence[str], *, skip_limit: int) -> None:
    """Raise if too many samples were left out, those of a new run (`news`) included."""
    skipped = [message for folder in folders.values() for message in folder.skipped] + list(news)
    if len(skipped) > skip_limit:
        raise SampleError(
            f"{len(skipped)} broken samples so far, and at most {skip_limit} may be left out;"
            " correct them, or raise --max-skipped or --max-skipped-share and give the command"
            f" again.\n{table_of_causes(skipped)}\n" + "\n".join(skipped[:NUM_SHOWN])
        )


def _write_run(
    reader: SampleReader,
    task: tuple[Source, Path, LineRun],
    *,
    max_shard_bytes: int,
    skip_limit: int,
) -> Iterator[Progress | FinishedRun]:
    """Write a run of lines; stops early when more of it is broken than in all may be."""
    source, folder, run = task
    shards: list[ShardFiles] = []
    skipped: list[str] = []
    writer: ShardWriter | None = None
    try:
        for number, line in read_lines(source.annotation, run):
            num_bytes = 0
            try:
                read = reader.read(line, source=source, number=number)
            except SampleError as error:
                skipped.append(str(error))
                if len(skipped) > skip_limit:
                    break
            else:
                if writer is None:
                    # Sorts in the source's order: `_` comes after `.` and before no later digit.
                    part = f"_{len(shards):03d}" if shards else ""
                    writer = ShardWriter(folder / f"shard-{run.number:06d}{part}.tar")
                num_bytes = writer.add(read)
                if writer.num_bytes >= max_shard_bytes:
                    shards.append(writer.close())
                    writer = None
            yield Progress(num_samples=1, num_bytes=num_bytes)
        if writer is not None:
            shards.append(writer.close())
    except BaseException:
        if writer is not None:
            writer.discard()
        raise
    yield FinishedRun(
        name=source.name, number=run.number, shards=tuple(shards), skipped=tuple(skipped)
    )
