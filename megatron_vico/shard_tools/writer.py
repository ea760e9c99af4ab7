"""Data sets in the official chat format -> folders of WebDataset shards; goes on after a kill.

What is in a shard depends on the input alone: a fixed run of lines becomes one, or several if it
has too many bytes. Every sample is decoded and encoded while it is written, so that a broken one is
found here and not in the middle of a run. The folder appears under its name only when it is
complete.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

from megatron_vico.data.encode.sample_encoder import EncodingSettings, SampleEncoder
from megatron_vico.data.encode.tokenizer import Tokenizer
from megatron_vico.data.shards.index import FolderIndex, ShardFiles
from megatron_vico.data.shards.mixture import MIXTURE_NAME, MIXTURE_VERSION
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.files import unfinished_path, write_text
from megatron_vico.shard_tools.journal import (
    JOURNAL_NAME,
    MADE_NAME,
    FinishedRun,
    Journal,
    check_made,
)
from megatron_vico.shard_tools.lines import LineRun, cut_lines, read_lines
from megatron_vico.shard_tools.options import FrameOptions, WriterOptions
from megatron_vico.shard_tools.pool import Progress, run_tasks, with_progress
from megatron_vico.shard_tools.sample_reader import SampleReader
from megatron_vico.shard_tools.sources import Source, read_meta
from megatron_vico.shard_tools.tar import ShardWriter

NUM_SHOWN = 5
"""Broken samples that an error shows."""


@dataclass(frozen=True, kw_only=True)
class MadeFolder:
    """A complete folder of shards."""

    path: Path

    source: Source
    """What it was made from."""

    index: FolderIndex

    @property
    def warning(self) -> str | None:
        """What the user should know of the source, if anything."""
        num_lines = self.index.num_samples + len(self.index.skipped)
        if self.source.length in (None, num_lines):
            return None
        return (
            f"{self.source.name}: the meta JSON says length {self.source.length}, but there are"
            f" {num_lines} lines"
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
    """Write a JSONL file and its media as shards; given again after an interruption, go on.

    Args:
        jsonl: see `Source.annotation`.
        image_root: see `Source.root`.
        out_dir: folder to make; must not exist, be empty, or be made by the same call.
        tokenizer: counts tokens.
        settings: tiling.
        options: of WriterOptions, the error budget is one for all data sets of `make_mixture`.

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
    return made[0].index


def make_mixture(
    meta: str | Path,
    *,
    out_dir: str | Path,
    tokenizer: Tokenizer,
    settings: EncodingSettings,
    options: WriterOptions | None = None,
) -> tuple[MadeFolder, ...]:
    """Write every data set of an official meta JSON, and `mixture.json` that lists the folders.

    See `read_meta` for the file, and `make_shards` for the rest and for errors. `out_dir` gets a
    folder for each data set, under its name.

    Returns:
        The folders, in the meta JSON's order.
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


class _Folder:
    """A folder being made, under another name until every run of lines is finished."""

    def __init__(
        self, source: Source, target: Path, *, encoder: SampleEncoder, options: WriterOptions
    ) -> None:
        self.source, self.target = source, target
        self.plan = cut_lines(source.annotation, samples_per_run=options.samples_per_shard)
        self.unfinished = unfinished_path(target)
        self._encoder = encoder
        self._made = {
            "data set": source.name,
            "sha256 of the JSONL": self.plan.sha256,
            "root": str(source.root.resolve()),
            "data_augment": source.data_augment,
            "data set's max_dynamic_patch": source.max_dynamic_patch,
            "tokenizer": encoder.tokenizer.fingerprint,
            **asdict(encoder.settings),
            "--samples-per-shard": options.samples_per_shard,
            "--max-shard-bytes": options.max_shard_bytes,
            "frames": {each.name: getattr(options, each.name) for each in fields(FrameOptions)},
        }
        self._index = self._finished_index()
        if self._index is None and not self.plan.runs:
            raise SampleError(
                f"{source.annotation}: no sample in it; expected one JSON object a line."
            )
        self._journal = None if self._index else Journal(self.unfinished, self._made)

    @property
    def finished(self) -> list[FinishedRun]:
        """Runs of lines whose files are complete, in the source's order; none once all are."""
        runs = self._journal.finished if self._journal else {}
        return [runs[number] for number in sorted(runs)]

    @property
    def skipped(self) -> tuple[str, ...]:
        """Messages of samples left out so far, in the source's order."""
        if self._index is not None:
            return self._index.skipped
        return tuple(message for run in self.finished for message in run.skipped)

    def missing_runs(self) -> list[LineRun]:
        """Runs still to be written."""
        done = {run.number for run in self.finished}
        return [] if self._index else [run for run in self.plan.runs if run.number not in done]

    def add(self, run: FinishedRun) -> None:
        """Take in a run whose files are complete."""
        assert self._journal is not None
        self._journal.add(run)

    def complete(self) -> MadeFolder:
        """Give the folder its index and its name."""
        if self._index is None:
            shards = tuple(shard for run in self.finished for shard in run.shards)
            if not shards:
                raise SampleError(
                    f"{self.source.annotation}: no sample in it that can be used: {self.skipped[0]}"
                )
            index = FolderIndex(
                tokenizer=self._encoder.tokenizer.fingerprint,
                settings=self._encoder.settings,
                shards=shards,
                skipped=self.skipped,
            )
            index.write(self.unfinished)
            os.replace(self.unfinished, self.target)
            shutil.rmtree(self.target / JOURNAL_NAME, ignore_errors=True)
            self._index = index
        return MadeFolder(path=self.target, source=self.source, index=self._index)

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._journal is not None:
            self._journal.close()

    def _finished_index(self) -> FolderIndex | None:
        """The index that an earlier call completed from the same input; None if there is none."""
        if not self.target.exists() or (self.target.is_dir() and not any(self.target.iterdir())):
            return None
        made = self.target / MADE_NAME
        if not made.is_file():
            raise ConfigError(
                f"{self.target}: not empty; give a folder that does not exist, or remove its"
                " content."
            )
        index = FolderIndex.read(self.target)
        # `vico shards index` may have counted again since then.
        counted = {"tokenizer": index.tokenizer, **asdict(index.settings)}
        check_made(json.loads(made.read_bytes()) | counted, self._made, where=self.target)
        # Of a run that was killed right at its end.
        shutil.rmtree(self.target / JOURNAL_NAME, ignore_errors=True)
        return index


def _make_folders(
    targets: Sequence[tuple[Source, Path]], encoder: SampleEncoder, options: WriterOptions
) -> tuple[MadeFolder, ...]:
    """Write all folders with one set of workers."""
    folders: dict[str, _Folder] = {}
    try:
        for source, target in targets:
            folders[source.name] = _Folder(source, target, encoder=encoder, options=options)
        num_samples = sum(folder.plan.num_samples for folder in folders.values())
        skip_limit = options.skip_limit(num_samples)
        tasks = [
            (folder.source, folder.unfinished, run)
            for folder in folders.values()
            for run in folder.missing_runs()
        ]
        _check_budget(folders, (), skip_limit=skip_limit)
        reader = SampleReader(encoder=encoder, frames=options)
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
        return tuple(folder.complete() for folder in folders.values())
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


def _check_budget(folders: dict[str, _Folder], news: Sequence[str], *, skip_limit: int) -> None:
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
