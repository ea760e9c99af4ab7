"""Data sets in the official chat format -> folders of WebDataset shards, by many processes; goes on
after a kill.

What is in a shard depends on the input alone: a fixed run of lines becomes one, or several if it
has too many bytes. Every sample is decoded and encoded while it is written, so that a broken one is
found here and not in the middle of a run. The folder appears under its name only when it is
complete.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from megatron_vico.data.encode.sample_encoder import EncodingSettings, SampleEncoder
from megatron_vico.data.encode.tokenizer import Tokenizer
from megatron_vico.data.shards.index import INDEX_NAME, FolderIndex, ShardFiles
from megatron_vico.data.shards.mixture import MIXTURE_NAME, MIXTURE_VERSION
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.files import write_text
from megatron_vico.shard_tools.journal import (
    JOURNAL_NAME,
    MADE_NAME,
    FinishedRun,
    Journal,
    check_made,
)
from megatron_vico.shard_tools.pool import Note, run_tasks
from megatron_vico.shard_tools.sources import (
    FrameOptions,
    LineRun,
    SampleReader,
    Source,
    cause_of,
    cut_lines,
    read_lines,
    read_meta,
)
from megatron_vico.shard_tools.tar import NEW_INDEX, ShardWriter, count_anew

NUM_SHOWN = 5
"""Broken samples that an error shows."""


@dataclass(frozen=True, kw_only=True)
class WriterOptions:
    """How shards are cut, what happens to broken samples, and how many processes do it."""

    samples_per_shard: int = 10_000
    """Lines that become one shard; also the unit of work of a process, and what a kill can lose of
    it."""

    max_shard_bytes: int = 1 << 30
    """A tar file is closed once it has this many bytes, and its lines go on in another."""

    max_skipped: int = 0
    """Broken samples that may be left out, over all data sets, each logged in the index; one more
    is an error."""

    max_skipped_share: float = 0.0
    """The same as a share of all samples, in [0, 1]; the larger of the two limits holds."""

    frames: FrameOptions = field(default_factory=FrameOptions)
    """Which frames of videos are taken."""

    num_workers: int = 1
    """Processes; with more than one, a script that calls this needs `if __name__ == "__main__"`."""

    show_progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: if a number is out of range."""
        frames = self.frames
        for name, value, least in (
            ("--samples-per-shard", self.samples_per_shard, 1),
            ("--max-shard-bytes", self.max_shard_bytes, 1),
            ("--max-skipped", self.max_skipped, 0),
            ("--workers", self.num_workers, 1),
            ("--min-num-frame", frames.min_num_frame, 1),
            ("--max-num-frame", frames.max_num_frame, frames.min_num_frame),
        ):
            if value < least:
                raise ConfigError(f"{name} {value}: expected at least {least}.")
        if not 0 <= self.max_skipped_share <= 1:
            raise ConfigError(
                f"--max-skipped-share {self.max_skipped_share}: expected a share from 0 to 1."
            )

    def most_skipped(self, num_samples: int) -> int:
        """How many of `num_samples` may be left out."""
        return max(self.max_skipped, int(self.max_skipped_share * num_samples))


@dataclass(frozen=True, kw_only=True)
class MadeFolder:
    """A complete folder of shards."""

    path: Path

    source: Source
    """What it was made from."""

    num_lines: int
    """Samples of the source, also those left out."""

    index: FolderIndex

    @property
    def warning(self) -> str | None:
        """What the user should know of the source, if anything."""
        if self.source.length in (None, self.num_lines):
            return None
        return (
            f"{self.source.name}: the meta JSON says length {self.source.length}, but there are"
            f" {self.num_lines} lines"
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
        jsonl: one sample a line: `conversations`, and `image` (a path or a list of paths) or
            `video` where it has any.
        image_root: folder or tar file that paths of media start from.
        out_dir: folder to make; must not exist, be empty, or be made by the same call.
        tokenizer: counts tokens.
        settings: tiling.
        options: sizes of shards, error budget and processes.

    Returns:
        The index that was written.

    Raises:
        ConfigError: if `out_dir` holds something else or cannot be written, a source does not
            exist, or a worker was killed.
        SampleError: if more samples are broken than `options` allow; names cause, file and line.
    """
    source = Source(name=Path(jsonl).stem, annotation=Path(jsonl), root=Path(image_root))
    source.check()
    encoder = SampleEncoder(tokenizer=tokenizer, settings=settings)
    with _disk_errors_explained(out_dir):
        return _make_folders(
            [(source, Path(out_dir))], encoder=encoder, options=options or WriterOptions()
        )[0].index


def make_mixture(
    meta: str | Path,
    *,
    out_dir: str | Path,
    tokenizer: Tokenizer,
    settings: EncodingSettings,
    options: WriterOptions | None = None,
) -> tuple[MadeFolder, ...]:
    """Write every data set of an official meta JSON as a folder of shards, and `mixture.json` that
    lists them.

    Args:
        meta: see `read_meta`.
        out_dir: gets a folder for each data set, under its name.
        tokenizer: counts tokens.
        settings: tiling.
        options: sizes of shards, error budget over all data sets, and processes.

    Returns:
        The folders, in the meta JSON's order.

    Raises:
        ConfigError: if the meta JSON is wrong, a folder holds something else or cannot be written,
            or a worker was killed.
        SampleError: if more samples are broken than `options` allow; names cause, file and line.
    """
    out = Path(out_dir)
    encoder = SampleEncoder(tokenizer=tokenizer, settings=settings)
    targets = [(source, out / source.name) for source in read_meta(meta)]
    with _disk_errors_explained(out):
        made = _make_folders(targets, encoder=encoder, options=options or WriterOptions())
        folders = [{"path": folder.source.name, "repeat": folder.source.repeat} for folder in made]
        mixture = {"version": MIXTURE_VERSION, "folders": folders}
        write_text(out / MIXTURE_NAME, json.dumps(mixture, indent=1))
    return made


def index_shards(
    folder: str | Path,
    *,
    tokenizer: Tokenizer,
    settings: EncodingSettings,
    num_workers: int = 1,
    show_progress: bool = False,
) -> FolderIndex:
    """Count a folder's tokens and tiles anew, for another tokenizer or tiling; the tar files stay
    as they are.

    Args:
        folder: made by `make_shards`; an index that is missing or broken is made from the tar files
            alone.
        tokenizer: counts tokens.
        settings: tiling.
        num_workers: processes.
        show_progress: show a progress bar.

    Returns:
        The index that was written.

    Raises:
        ConfigError: if there are no shards, or a worker was killed.
        SampleError: if a tar file or a sample in it is broken.
    """
    path = Path(folder)
    files = sorted(path.glob("shard-*.tar"))
    if not files:
        raise ConfigError(f"{path}: no shard-*.tar in it; make the folder with `vico shards make`.")
    encoder = SampleEncoder(tokenizer=tokenizer, settings=settings)
    shards: dict[str, ShardFiles] = {}
    with _progress_bar(total=None, done=0, shown=show_progress) as note:
        results = run_tasks(_count_anew, files, shared=encoder, num_workers=num_workers, note=note)
        with closing(results):
            shards.update((shard.name, shard) for shard in results)
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
    listed = tuple(shards[file.name] for file in files)
    index = FolderIndex(
        tokenizer=tokenizer.fingerprint, settings=settings, shards=listed, skipped=skipped
    )
    index.write(path)
    return index


def table_of_causes(skipped: Sequence[str]) -> str:
    """How many samples were left out for which cause, a line each."""
    causes = Counter(map(cause_of, skipped)).most_common()
    return "\n".join(f"  {cause:20} {count:>10}" for cause, count in causes)


@dataclass(frozen=True, kw_only=True)
class _RunTask:
    """A run of lines to be written, and where."""

    source: Source
    folder: Path
    run: LineRun
    max_shard_bytes: int
    most_skipped: int


class _Folder:
    """A folder on its way: beside its final place under another name, until every run of lines is
    finished."""

    def __init__(
        self, source: Source, target: Path, *, encoder: SampleEncoder, options: WriterOptions
    ) -> None:
        self.source, self.target = source, target
        self.plan = cut_lines(source.annotation, samples_per_run=options.samples_per_shard)
        self.partial = target.with_name(target.name + ".partial")
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
            "frames": asdict(options.frames),
        }
        self.index: FolderIndex | None = self._finished_index()
        """When the folder is complete."""
        if self.index is None and not self.plan.runs:
            raise SampleError(
                f"{source.annotation}: no sample in it; expected one JSON object a line."
            )
        self._journal = None if self.index else Journal(self.partial, self._made)

    @property
    def skipped(self) -> tuple[str, ...]:
        """Messages of samples left out so far, in the source's order."""
        if self._journal is None:
            return self.index.skipped if self.index else ()
        return tuple(
            message
            for number in sorted(self._journal.finished)
            for message in self._finished(number).skipped
        )

    def missing_runs(self) -> list[LineRun]:
        """Runs still to be written."""
        return [
            run
            for run in self.plan.runs
            if self._journal and run.number not in self._journal.finished
        ]

    def add(self, run: FinishedRun) -> None:
        """Take in a run whose files are complete."""
        assert self._journal is not None
        self._journal.add(run)

    def complete(self) -> MadeFolder:
        """Give the folder its index and its name."""
        if self._journal is not None:
            shards = tuple(s for run in self.plan.runs for s in self._finished(run.number).shards)
            if not shards:
                raise SampleError(
                    f"{self.source.annotation}: no sample in it that can be used: {self.skipped[0]}"
                )
            self.index = FolderIndex(
                tokenizer=self._encoder.tokenizer.fingerprint,
                settings=self._encoder.settings,
                shards=shards,
                skipped=self.skipped,
            )
            write_text(self.partial / MADE_NAME, json.dumps(self._made, indent=1))
            self.index.write(self.partial)
            os.replace(self.partial, self.target)
            (self.target / JOURNAL_NAME).unlink()
            self.close()
        assert self.index is not None
        return MadeFolder(
            path=self.target, source=self.source, num_lines=self.plan.num_samples, index=self.index
        )

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _finished(self, number: int) -> FinishedRun:
        assert self._journal is not None
        return self._journal.finished[number]

    def _finished_index(self) -> FolderIndex | None:
        """The index of a folder that an earlier call completed from the same input; None if there
        is nothing yet."""
        if not self.target.exists() or (self.target.is_dir() and not any(self.target.iterdir())):
            return None
        made = self.target / MADE_NAME
        if not made.is_file():
            raise ConfigError(
                f"{self.target}: not empty; give a folder that does not exist, or remove its"
                " content."
            )
        index = FolderIndex.read(self.target)
        # `vico shards index` may have counted anew since then.
        counted = {"tokenizer": index.tokenizer, **asdict(index.settings)}
        check_made(json.loads(made.read_bytes()) | counted, self._made, where=self.target)
        (self.target / JOURNAL_NAME).unlink(
            missing_ok=True
        )  # of a run that was killed right at its end
        return index


def _make_folders(
    targets: Sequence[tuple[Source, Path]], *, encoder: SampleEncoder, options: WriterOptions
) -> tuple[MadeFolder, ...]:
    """Write all folders with one set of workers."""
    folders: dict[str, _Folder] = {}
    try:
        for source, target in targets:
            folders[source.name] = _Folder(source, target, encoder=encoder, options=options)
        num_samples = sum(folder.plan.num_samples for folder in folders.values())
        most_skipped = options.most_skipped(num_samples)
        tasks = [
            _RunTask(
                source=folder.source,
                folder=folder.partial,
                run=run,
                max_shard_bytes=options.max_shard_bytes,
                most_skipped=most_skipped,
            )
            for folder in folders.values()
            for run in folder.missing_runs()
        ]
        _check_budget(folders, (), most_skipped=most_skipped)
        num_missing = sum(task.run.num_samples for task in tasks)
        with _progress_bar(
            total=num_samples, done=num_samples - num_missing, shown=options.show_progress
        ) as note:
            results = run_tasks(
                _write_run,
                tasks,
                shared=SampleReader(encoder=encoder, frames=options.frames),
                num_workers=options.num_workers,
                note=note,
            )
            with closing(results):
                for run in results:
                    if run.skipped:
                        _check_budget(folders, run.skipped, most_skipped=most_skipped)
                    folders[run.name].add(run)
        return tuple(folder.complete() for folder in folders.values())
    finally:
        for folder in folders.values():
            folder.close()


@contextmanager
def _disk_errors_explained(out: str | Path) -> Iterator[None]:
    """What cannot be read of a sample's media is an error of the sample; this is all else, a full
    disk above all."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{out}: {error}; make room or correct the rights, and give the same command again:"
            " finished work is kept."
        ) from error


def _check_budget(folders: dict[str, _Folder], news: Sequence[str], *, most_skipped: int) -> None:
    """Raise if the samples left out so far, and those of a run that is not taken in yet, are more
    than may be."""
    skipped = [message for folder in folders.values() for message in folder.skipped] + list(news)
    if len(skipped) > most_skipped:
        raise SampleError(
            f"{len(skipped)} broken samples so far, and at most {most_skipped} may be left out;"
            " correct them, or raise --max-skipped or --max-skipped-share and give the command"
            f" again.\n{table_of_causes(skipped)}\n" + "\n".join(skipped[:NUM_SHOWN])
        )


def _write_run(reader: SampleReader, task: _RunTask, note: Note) -> FinishedRun:
    """Write one run of lines; stops early when more of its samples are broken than in all may
    be."""
    shards: list[ShardFiles] = []
    skipped: list[str] = []
    writer: ShardWriter | None = None
    try:
        for number, line in read_lines(task.source.annotation, task.run):
            num_bytes = 0
            try:
                read = reader.read(line, source=task.source, number=number)
            except SampleError as error:
                skipped.append(str(error))
                if len(skipped) > task.most_skipped:
                    break
            else:
                if writer is None:
                    writer = ShardWriter(
                        task.folder / _name_of_tar(task.run.number, part=len(shards))
                    )
                num_bytes = writer.add(read.sample, suffixes=read.suffixes, encoded=read.encoded)
                if writer.num_bytes >= task.max_shard_bytes:
                    shards.append(writer.close())
                    writer = None
            note(1, num_bytes)
        if writer is not None:
            shards.append(writer.close())
    except BaseException:
        if writer is not None:
            writer.discard()
        raise
    return FinishedRun(
        name=task.source.name, number=task.run.number, shards=tuple(shards), skipped=tuple(skipped)
    )


def _name_of_tar(run: int, *, part: int) -> str:
    """Sorts in the source's order: `_` comes after `.`, and before no digit of a later run."""
    return f"shard-{run:06d}_{part:03d}.tar" if part else f"shard-{run:06d}.tar"


def _count_anew(encoder: SampleEncoder, path: Path, note: Note) -> ShardFiles:
    shard = count_anew(path, encoder=encoder)
    note(shard.num_samples, shard.num_bytes)
    return shard


@contextmanager
def _progress_bar(*, total: int | None, done: int, shown: bool) -> Iterator[Note]:
    with tqdm(total=total, initial=done, unit=" samples", disable=not shown) as bar:
        written = 0

        def note(samples: int, num_bytes: int) -> None:
            nonlocal written
            written += num_bytes
            bar.set_postfix_str(tqdm.format_sizeof(written, "B"), refresh=False)
            bar.update(samples)

        yield note
