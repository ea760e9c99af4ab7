"""A folder of shards while it is made and when it is complete; making it goes on after a kill.

Until it is complete it has another name and, beside its shards, `made.json` (what they are made
from) and `journal/`, with a file for each finished run of lines: which shards it became, and what
was left out. Hashes of shards alone would not do: a run may have become none or several, and its
skipped samples count.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_vico.data.encode.sample_encoder import SampleEncoder
from megatron_vico.data.shards.index import INDEX_NAME, FolderIndex, ShardFiles, hash_of_file
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.files import read_json, unfinished_path, write_text
from megatron_vico.shard_tools.lines import LineRun, cut_lines
from megatron_vico.shard_tools.options import FrameOptions, WriterOptions
from megatron_vico.shard_tools.sources import Source

JOURNAL_NAME = "journal"
MADE_NAME = "made.json"


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """What a run of lines became."""

    name: str
    """Of the data set."""

    number: int
    """Of the run."""

    shards: tuple[ShardFiles, ...]
    """None if all its samples were left out, several if one would have too many bytes."""

    skipped: tuple[str, ...]
    """One message for each sample left out."""

    @classmethod
    def read(cls, path: Path) -> "FinishedRun | None":
        """As `MadeFolder.add` wrote it; None if it is damaged, and the run is made again."""
        try:
            fields = json.loads(path.read_bytes())
            shards = tuple(ShardFiles(**shard) for shard in fields["shards"])
            return cls(**fields | {"shards": shards, "skipped": tuple(fields["skipped"])})
        except (ValueError, LookupError, TypeError, RecursionError):
            return None


class MadeFolder:
    """The shards of a source; only one process at a time can make them."""

    def __init__(
        self, source: Source, path: Path, *, encoder: SampleEncoder, options: WriterOptions
    ) -> None:
        """Begin, or go on with what is finished; files of unfinished runs are removed.

        Raises:
            ConfigError: if another process has the folder, or it is of something else.
            SampleError: if the source has no sample.
        """
        self.source, self.path = source, path
        self.plan = cut_lines(source.annotation, samples_per_run=options.samples_per_shard)
        self.unfinished = unfinished_path(path)
        self._runs = self.unfinished / JOURNAL_NAME
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
            # Absent where they have no effect, as in folders from before they were there.
            "--seq-length": options.seq_length,
            "--max-tiles-per-pack": options.max_tiles_per_pack,
            "--allow-outside-root": options.allow_outside_root or None,
            "frames": {each.name: getattr(options, each.name) for each in fields(FrameOptions)},
        }
        self._finished: dict[int, FinishedRun] = {}
        self.index = self._complete_index()
        """None until the folder is complete."""

        if self.index is not None:
            return
        if not self.plan.runs:
            raise SampleError(
                f"{source.annotation}: no sample in it; expected one JSON object a line."
            )
        self._runs.mkdir(parents=True, exist_ok=True)
        self._lock = (self._runs / "lock").open("w")
        try:
            self._go_on()
        except BaseException:
            self.close()
            raise

    @property
    def skipped(self) -> tuple[str, ...]:
        """Messages of samples left out so far, in the source's order."""
        if self.index is not None:
            return self.index.skipped
        return tuple(message for run in self._in_order() for message in run.skipped)

    @property
    def warning(self) -> str | None:
        """What the user should know of the source of a complete folder, if anything."""
        assert self.index is not None
        num_lines = self.index.num_samples + len(self.index.skipped)
        if self.source.length in (None, num_lines):
            return None
        return (
            f"{self.source.name}: the meta JSON says length {self.source.length}, but there are"
            f" {num_lines} lines"
        )

    def missing_runs(self) -> list[LineRun]:
        """Runs of lines still to be written."""
        if self.index is not None:
            return []
        return [run for run in self.plan.runs if run.number not in self._finished]

    def add(self, run: FinishedRun) -> None:
        """Note that a run's files are complete."""
        write_text(self._note(run.number), json.dumps(asdict(run)))
        self._finished[run.number] = run

    def complete(self) -> FolderIndex:
        """Give the folder its index and its name."""
        if self.index is None:
            shards = tuple(shard for run in self._in_order() for shard in run.shards)
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
            os.replace(self.unfinished, self.path)
            shutil.rmtree(self.path / JOURNAL_NAME, ignore_errors=True)
            self.close()
            self.index = index
        return self.index

    def close(self) -> None:
        """Let other processes have the folder."""
        if self.index is None:
            self._lock.close()

    def _complete_index(self) -> FolderIndex | None:
        """The index that an earlier call completed from the same input; None if there is none."""
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return None
        if not (self.path / MADE_NAME).is_file():
            raise ConfigError(
                f"{self.path}: not empty; give a folder that does not exist, or remove its content."
            )
        index = FolderIndex.read(self.path)
        # `vico shards index` may have counted again since then.
        self._check_made(self.path, {"tokenizer": index.tokenizer, **asdict(index.settings)})
        # Of a run that was killed right at its end.
        shutil.rmtree(self.path / JOURNAL_NAME, ignore_errors=True)
        return index

    def _check_made(self, folder: Path, counted: Mapping[str, Any]) -> None:
        before, now = read_json(folder / MADE_NAME) | dict(counted), self._made
        names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
        if names:
            differences = "; ".join(
                f"{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in names
            )
            raise ConfigError(
                f"{folder}: not empty, and made from something else: {differences}. Give another"
                " --out, remove the folder, or give the command that it was made with."
            )

    def _go_on(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{self.unfinished}: another process is making it; wait for it, or end it."
            ) from error
        except OSError:
            pass  # a file system without locks
        runs = map(FinishedRun.read, self._runs.glob("*.json"))
        self._finished = {run.number: run for run in runs if run and self._is_whole(run)}
        if self._finished:
            self._check_made(self.unfinished, {})
        else:
            write_text(self.unfinished / MADE_NAME, json.dumps(self._made, indent=1))
        self._remove_unfinished()

    def _is_whole(self, run: FinishedRun) -> bool:
        """Whether the files are there; of tar files, which may be many TB, only sizes are read."""
        folder = self.unfinished
        return all(
            (folder / shard.name).is_file()
            and (folder / shard.name).stat().st_size == shard.num_bytes
            and (folder / shard.index_name).is_file()
            and hash_of_file(folder / shard.index_name) == shard.index_sha256
            for shard in run.shards
        )

    def _remove_unfinished(self) -> None:
        kept = {self._note(number) for number in self._finished}
        for run in self._finished.values():
            for shard in run.shards:
                kept |= {self.unfinished / shard.name, self.unfinished / shard.index_name}
        for pattern in ("shard-*", f"{INDEX_NAME}*", f"{JOURNAL_NAME}/*.json*"):
            for path in set(self.unfinished.glob(pattern)) - kept:
                path.unlink()

    def _note(self, number: int) -> Path:
        return self._runs / f"{number:06d}.json"

    def _in_order(self) -> list[FinishedRun]:
        return [self._finished[number] for number in sorted(self._finished)]
