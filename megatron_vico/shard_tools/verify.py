"""Reads folders of shards from the first byte to the last and says what is wrong where."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from megatron_vico.data.shards.index import INDEX_NAME, FolderIndex, ShardIndex
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.shard_tools.made_folder import MADE_NAME
from megatron_vico.shard_tools.pool import Progress, run_tasks
from megatron_vico.shard_tools.shard_check import (
    Job,
    Problem,
    ProblemCause,
    VerifyOptions,
    check_shard,
    runs_of,
)


class Verification:
    """What is to be verified; iterate over it for problems and progress."""

    def __init__(self, paths: Sequence[Path], options: VerifyOptions) -> None:
        """Read the indexes of folders, each once; ConfigError if an option is out of range."""
        share = options.sample_share
        if not 0 <= share <= 1:
            raise ConfigError(f"--sample-share {share}: expected a share from 0 to 1.")
        if options.num_workers < 0:
            raise ConfigError(f"--workers {options.num_workers}: expected at least 0.")
        self._options = options
        self._problems: list[Problem] = []
        self._jobs: list[Job] = []
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

    def __iter__(self) -> Iterator[Problem | Progress]:
        yield from self._problems
        check = partial(check_shard, self._options)
        with run_tasks(check, self._jobs, num_workers=self._options.num_workers) as results:
            yield from results
        yield from _duplicates(self._jobs)

    def _add(self, path: Path) -> None:
        def note(cause: ProblemCause, *, found: str, expected: str, file: str = "") -> None:
            self._problems.append(
                Problem(cause=cause, folder=str(path), file=file, found=found, expected=expected)
            )

        try:
            index = FolderIndex.read(path)
        except (ConfigError, SampleError, OSError) as error:
            expected = "a folder made by `vico shards make`"
            note("broken index", found=str(error), expected=expected, file=INDEX_NAME)
            return
        tokenizer = self._options.tokenizer
        if tokenizer is not None and tokenizer.fingerprint != index.tokenizer:
            found = f"{tokenizer.source} is {tokenizer.fingerprint}"
            how = "which the index was made with (its counts are not compared)"
            note("other tokenizer", found=found, expected=f"{index.tokenizer}, {how}")
        known = {INDEX_NAME, MADE_NAME}
        known |= {name for shard in index.shards for name in (shard.name, shard.index_name)}
        for name in sorted({entry.name for entry in path.iterdir()} - known):
            found, expected = "a file that no shard needs", "only what the index lists"
            note("file not listed", found=found, expected=expected, file=name)
        for shard in index.shards:
            only = replace(index, shards=(shard,), skipped=())
            self._jobs.append(Job(folder=path, index=only))


def _duplicates(jobs: Sequence[Job]) -> Iterator[Problem]:
    """One problem for each run of neighbours whose keys came before, in one other shard.

    Keys are compared as hashes of 8 bytes: those of 100 million samples fit into memory.
    """
    hashes = [np.array([hash(key) for key in _keys_of(job)], dtype=np.int64) for job in jobs]
    together = np.concatenate([np.empty(0, np.int64), *hashes])
    sizes = list(map(len, hashes))
    owners, starts = np.repeat(np.arange(len(jobs)), sizes), np.cumsum([0, *sizes]).tolist()
    values, counts = np.unique(together, return_counts=True)
    keys_of: dict[int, list[bytes]] = {}
    seen: dict[bytes, int] = {}
    again: dict[int, tuple[int, int, str]] = {}  # sample of all -> first job, job, key
    for sample in np.flatnonzero(np.isin(together, values[counts > 1])).tolist():
        job = int(owners[sample])
        if job not in keys_of:
            keys_of[job] = _keys_of(jobs[job])
        key = keys_of[job][sample - starts[job]]
        if key in seen:
            again[sample] = (seen[key], job, key.decode())
        seen.setdefault(key, job)
    for run in runs_of(list(again), reason=lambda sample: again[sample][:2]):
        origin, job, _ = again[run[0]]
        keys = [again[sample][2] for sample in run]
        found, expected = f"also in {jobs[origin].tar}", "each key once"
        yield jobs[job].problem("duplicate key", found=found, expected=expected, keys=keys)


def _keys_of(job: Job) -> list[bytes]:
    """Keys of a shard; none if its index cannot be used."""
    try:
        keys = ShardIndex.read(job.folder / job.shard.index_name).keys.tolist()
    except SampleError:
        return []
    return keys if len(keys) == job.shard.num_samples else []
