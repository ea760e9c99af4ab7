"""Shards at a URL read as local ones; errors that pass are tried again, others not; the cache keeps
to its limit."""

import asyncio
import errno
import logging
import multiprocessing
import os
import pickle
import random

import fsspec
import pytest
from filelock import FileLock
from fsspec.registry import known_implementations

from megatron_vico.config.schema import DataOptions
from megatron_vico.data.shards import storage
from megatron_vico.data.shards.reader import ShardFolder
from megatron_vico.errors import ConfigError, SampleError
from tests.unit.data.flaky_files import CUT, WHOLE, install

TAR = "shard-000001.tar"
IN_TAR = 20
"""A sample of that shard."""


class StatusError(Exception):
    """As aiohttp and gcsfs report an HTTP status."""

    def __init__(self, status):
        super().__init__(f"status {status}")
        self.status = status

    def __repr__(self):
        return "headers with a token"


@pytest.fixture
def flaky(monkeypatch, tmp_path):
    return install(monkeypatch, tmp_path)


@pytest.fixture
def sleeps(monkeypatch):
    waits = []
    monkeypatch.setattr(storage, "sleep", waits.append)
    return waits


@pytest.fixture
def remote(flaky, copy, sleeps):
    """Opens the copy by its URL."""
    return lambda **options: ShardFolder.open(f"flaky://{copy}", options=DataOptions(**options))


def cache_of(folder, num_bytes=10**9):
    return {"data_cache_dir": str(folder), "data_cache_gb": (num_bytes + 0.5) / 1e9}


def requests(flaky, name=TAR):
    return flaky.log.read_text().split().count(name)


def samples(folder):
    return [folder.read(number) for number in range(len(folder))]


def cached(folder, suffix=".tar"):
    return {path.stem for path in folder.iterdir() if path.suffix == suffix}


@pytest.mark.parametrize("scheme", ["file", "memory", "flaky"])
@pytest.mark.parametrize("with_cache", [False, True])
def test_a_url_reads_as_a_local_folder(shards, flaky, tmp_path, scheme, with_cache):
    url = f"{scheme}://{shards}"
    if scheme == "memory":
        fsspec.filesystem("memory").put(f"{shards}/", f"{shards}/", recursive=True)
    options = DataOptions(**(cache_of(tmp_path / "cache") if with_cache else {}))
    folder, local = (
        ShardFolder.open(url, options=options),
        ShardFolder.open(shards),
    )
    assert folder.path == url
    assert folder.index == local.index
    assert samples(folder) == samples(local)
    assert samples(pickle.loads(pickle.dumps(folder))) == samples(local)


def test_a_sample_is_one_request(remote, flaky):
    folder = remote()
    assert requests(flaky) == 0  # sizes alone
    folder.read(IN_TAR)
    assert requests(flaky) == 1


def test_a_missing_driver_and_a_missing_folder_are_named(flaky, tmp_path, monkeypatch):
    driver = {"class": "no_such_module.Files", "err": "Install nofs to access nowhere"}
    monkeypatch.setitem(known_implementations, "nowhere", driver)
    with pytest.raises(ConfigError, match=r"^nowhere://a/b: .*Install nofs to access nowhere"):
        ShardFolder.open("nowhere://a/b")
    with pytest.raises(ConfigError, match=r"^nothing://a: .*Protocol not known: nothing"):
        ShardFolder.open("nothing://a")
    with pytest.raises(ConfigError, match=r"^flaky://.*: no index.json there"):
        ShardFolder.open(f"flaky://{tmp_path}")


def test_errors_that_pass_are_tried_again_and_logged_once_each(remote, flaky, sleeps, caplog):
    folder = remote()
    right = folder.read(IN_TAR)
    state = random.getstate()
    passing = [ConnectionResetError("gone"), TimeoutError(), StatusError(503), CUT]
    flaky.script[TAR] = [*passing, StatusError(429)]
    with caplog.at_level(logging.WARNING):
        assert folder.read(IN_TAR) == right
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 5
    assert "gone" in caplog.messages[0]
    assert f"{TAR}: ConnectionResetError: gone" in caplog.messages[0]
    assert "token" not in caplog.text
    assert "try 2 of 6" in caplog.messages[0]
    assert all(2 ** (n + 1) * 0.5 <= s <= 2 ** (n + 1) * 1.5 for n, s in enumerate(sleeps))
    assert len(set(sleeps)) == 5
    assert random.getstate() == state  # the waits are drawn elsewhere


@pytest.mark.parametrize("name", ["index.json", "shard-000002.npz"])
def test_indexes_are_tried_again_too(remote, flaky, sleeps, shards, name):
    flaky.script[name] = [OSError(errno.EIO, "once"), CUT]
    assert samples(remote()) == samples(ShardFolder.open(shards))
    assert len(sleeps) == 2


def test_errors_that_stay_are_not_tried_again(remote, flaky, sleeps):
    folder, errors = remote(), [PermissionError("no"), FileNotFoundError("no"), StatusError(403)]
    errors += [ValueError("bad"), OSError(errno.EINVAL, "The requested range is not satisfiable")]
    flaky.script[TAR] = list(errors)
    message = rf"flaky://.*{TAR}.* (tries: 1, last cause|is missing)"
    for _ in errors:
        with pytest.raises(SampleError, match=message):
            folder.read(IN_TAR)
    assert sleeps == []
    assert requests(flaky) == len(errors)


def test_after_the_last_try_url_tries_and_cause_are_named(remote, flaky, sleeps):
    folder = remote(data_retries=2)
    flaky.script[TAR] = [OSError("first"), OSError("second"), OSError("third")]
    message = rf"flaky://.*{TAR}: cannot be read; tries: 3, last cause: OSError: third"
    with pytest.raises(SampleError, match=message):
        folder.read(IN_TAR)
    assert len(sleeps) == 2
    flaky.script[TAR] = [OSError("once")]
    with pytest.raises(SampleError, match="tries: 1,"):
        remote(data_retries=0).read(IN_TAR)


def test_a_server_that_sends_whole_files_is_named(remote, flaky, sleeps):
    folder = remote()
    flaky.script[TAR] = [WHOLE]
    with pytest.raises(SampleError, match="the server must answer requests for a range of bytes"):
        folder.read(IN_TAR)
    assert sleeps == []


def test_a_file_that_is_short_itself_is_not_asked_again(remote, copy, sleeps):
    folder = remote()
    whole = (copy / TAR).read_bytes()
    for cut in (3000, len(whole) // 2):
        (copy / TAR).write_bytes(whole[:cut])
        with pytest.raises(SampleError, match=rf"{TAR} ends after {cut} bytes"):
            samples(folder)
    assert sleeps == []
    message = f"flaky://.*{TAR}: {cut} bytes, but the index says {len(whole)}"
    with pytest.raises(SampleError, match=message):
        remote()


def test_a_shard_is_fetched_once_and_kept(remote, flaky, tmp_path):
    options = cache_of(tmp_path / "cache")
    folder = remote(**options)
    right = samples(remote())
    flaky.log.write_text("")
    assert samples(folder) == right
    assert samples(remote(**options)) == right
    assert requests(flaky) == 1
    assert cached(tmp_path / "cache") == {shard.sha256 for shard in folder.index.shards}
    assert not cached(tmp_path / "cache", ".incomplete")


def test_those_used_longest_ago_make_room_and_their_readers_read_on(remote, flaky, tmp_path):
    cache = tmp_path / "cache"
    index = remote().index
    limit = index.shards[0].num_bytes + max(shard.num_bytes for shard in index.shards[1:])
    folder = remote(**cache_of(cache, limit))
    first, second, third = (shard.sha256 for shard in index.shards)
    folder.read(0)
    folder.read(IN_TAR)
    assert cached(cache) == {first, second}
    for n, name in enumerate((second, first)):
        os.utime(cache / f"{name}.tar", (n, n))  # clocks of file systems are coarse
    folder.read(1)
    assert cached(cache) == {first, second}
    with (cache / f"{second}.tar").open("rb") as reader:
        folder.read(len(folder) - 1)
        assert cached(cache) == {first, third}
        assert len(reader.read()) == index.shards[1].num_bytes
    right = samples(remote())
    assert samples(folder) == right
    assert sum(path.stat().st_size for path in cache.glob("*.tar")) <= limit


def test_a_cache_that_cannot_work_is_refused(remote, tmp_path):
    message = r"--data-cache-gb 1e-06 is less than shard-000001.tar alone"
    with pytest.raises(ConfigError, match=message):
        remote(**cache_of(tmp_path / "cache", 1000)).read(IN_TAR)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--data-cache-dir .*file: "):
        remote(**cache_of(tmp_path / "file")).read(IN_TAR)


def test_damage_in_the_cache_is_repaired_and_wrong_content_never_enters_it(
    remote, copy, flaky, tmp_path
):
    cache = tmp_path / "cache"
    folder = remote(**cache_of(cache))
    right, shard = folder.read(IN_TAR), folder.index.shards[1]
    kept = cache / f"{shard.sha256}.tar"
    os.truncate(kept, 700)
    assert folder.read(IN_TAR) == right
    assert kept.stat().st_size == shard.num_bytes
    kept.unlink()
    content = bytearray((copy / TAR).read_bytes())
    content[-1] ^= 1
    (copy / TAR).write_bytes(content)
    with pytest.raises(SampleError, match=rf"{TAR}: .*sha256 differs"):
        folder.read(IN_TAR)
    assert not cached(cache)
    assert not cached(cache, ".incomplete")


def test_what_an_ended_process_left_is_removed_and_what_is_being_fetched_is_not(remote, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("ended", "working"):
        (cache / f"{name}.incomplete").write_bytes(bytes(100))
    with FileLock(cache / "working.lock"):
        remote(**cache_of(cache)).read(IN_TAR)
        assert cached(cache, ".incomplete") == {"working"}


def in_processes(work, arguments):
    """`work` in forked processes, all at once; their answers."""
    fork = multiprocessing.get_context("fork")
    answers, start = fork.SimpleQueue(), fork.Barrier(len(arguments))

    def run(argument):
        start.wait()
        try:
            answers.put(work(argument))
        except Exception as error:
            answers.put(error)

    processes = [fork.Process(target=run, args=(argument,)) for argument in arguments]
    for process in processes:
        process.start()
    got = [answers.get() for _ in processes]
    for process in processes:
        process.join()
    return got


def test_processes_that_want_the_same_shard_fetch_it_once(remote, flaky, tmp_path):
    folder, right = remote(**cache_of(tmp_path / "cache")), remote().read(IN_TAR)
    flaky.log.write_text("")
    assert in_processes(folder.read, [IN_TAR] * 4) == [right] * 4
    assert requests(flaky) == 1


def test_reads_go_on_in_a_forked_process(remote, flaky, copy):
    folder = remote()
    right = folder.read(IN_TAR)
    assert in_processes(folder.read, [IN_TAR] * 2) == [right] * 2
    # The trap this avoids: a file system made before the fork.
    held, _ = fsspec.url_to_fs(f"flaky://{copy}")
    assert isinstance(in_processes(held.cat_file, [f"{copy}/{TAR}"])[0], RuntimeError)


def test_a_server_that_accepts_and_never_answers(remote, flaky, sleeps, monkeypatch):
    """Whatever limit its driver has; the read is tried again, and the process can end."""
    folder = remote(data_timeout_s=0.5, data_retries=1)

    async def never(self, path, start=None, end=None, **_):
        with self.log.open("a") as log:
            log.write(f"{TAR}\n")
        await asyncio.sleep(3600)

    before = requests(flaky)
    monkeypatch.setattr(flaky, "_cat_file", never)
    flaky.clear_instance_cache()
    with pytest.raises(SampleError, match=r"tries: 2, last cause: TimeoutError: no answer within"):
        folder.read(IN_TAR)
    assert (requests(flaky) - before, len(sleeps)) == (2, 1)
