"""Shards are the same bytes however many processes make them, and however often they are killed."""

import contextlib
import fcntl
import functools
import json
import multiprocessing
import re
import resource
import signal
import time

import psutil
import pytest

from megatron_vico.cli.shards import main
from megatron_vico.data.encode import tiling
from megatron_vico.data.shards.reader import ShardFolder
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.shard_tools.made_folder import JOURNAL_NAME, MADE_NAME
from megatron_vico.shard_tools.options import WriterOptions
from megatron_vico.shard_tools.reindex import index_shards
from megatron_vico.shard_tools.writer import make_mixture
from tests.toy_data import write_conversations
from tests.unit.conftest import SETTINGS
from tests.unit.shard_tools.test_sources import frames_of, picture, row, write_tar

TIMEOUT_S = 120


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def keys_of(path):
    folder = ShardFolder.open(path)
    return [folder.describe(number).key for number in range(len(folder))]


def with_broken_lines(folder, *, num_samples, broken):
    """The toy conversations, with JSON that ends too early in the given lines (from 1)."""
    jsonl = write_conversations(folder, num_samples=num_samples)
    lines = enumerate(jsonl.read_text().splitlines(), start=1)
    jsonl.write_text("".join((line[:20] if n in broken else line) + "\n" for n, line in lines))
    return jsonl


@contextlib.contextmanager
def files_of_at_most(num_bytes):
    """Writing on fails as on a full disk, with another number."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_named_and_left_clean(tmp_path, make):
    jsonl, out = write_conversations(tmp_path / "raw", num_samples=8), tmp_path / "out"
    message = r"out: .*File too large; make room"
    with files_of_at_most(8192), pytest.raises(ConfigError, match=message):
        make(jsonl, out, samples_per_shard=4)
    left = sorted(path.name for path in (tmp_path / "out.incomplete").iterdir())
    assert left == [JOURNAL_NAME, MADE_NAME]
    make(jsonl, out, samples_per_shard=4)
    assert len(keys_of(out)) == 8


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, make, tokenizer):
    jsonl = with_broken_lines(tmp_path / "raw", num_samples=24, broken={3, 9, 21})
    options = {"samples_per_shard": 5, "max_shard_bytes": 1000, "max_skipped": 3}
    for num_workers in (1, 2, 3):
        out = tmp_path / f"out{num_workers}"
        index = make(jsonl, out, num_workers=num_workers, **options)
        assert content(out) == content(tmp_path / "out1")
    lines = [re.search(r":(\d+): sample", message)[1] for message in index.skipped]
    assert lines == ["3", "9", "21"]
    names = [shard.name for shard in index.shards]
    assert names == sorted(names)
    assert "shard-000001_001.tar" in names  # the limit in bytes cut a run in several
    numbers = [n for n in range(1, 25) if n not in (3, 9, 21)]
    assert keys_of(out) == [f"conversations-{n:08d}" for n in numbers]
    # Indexes that workers rebuild are the same, too.
    for path in out.glob("*.npz"):
        path.write_bytes(b"broken")
    index_shards(out, tokenizer=tokenizer, settings=SETTINGS, num_workers=2)
    assert content(out) == content(tmp_path / "out1")


def test_too_many_broken_samples_end_it_with_a_table_and_the_rest_is_kept(tmp_path, make):
    jsonl = with_broken_lines(tmp_path / "raw", num_samples=20, broken={7, 8, 9})
    (jsonl.parent / "000_0.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    for num_workers in (1, 2):
        with pytest.raises(SampleError, match="at most 2 may be left out") as raised:
            make(jsonl, out, samples_per_shard=5, max_skipped_share=0.1, num_workers=num_workers)
        message = str(raised.value)
        assert re.search(r"broken line +[23]\n", message)
        assert f"broken line: {jsonl}:7: sample 'conversations-00000007': broken JSON" in message
    assert not out.exists()
    index = make(jsonl, out, samples_per_shard=5, max_skipped_share=0.2)
    causes = [message.partition(":")[0] for message in index.skipped]
    assert causes == ["broken image", *["broken line"] * 3]
    assert index.num_samples == 16


def test_nothing_is_overwritten_and_what_has_no_sample_is_refused(tmp_path, make):
    jsonl, out = with_broken_lines(tmp_path / "raw", num_samples=2, broken={1, 2}), tmp_path / "out"
    with pytest.raises(SampleError, match=r"no sample in it that can be used: broken line: .*:1:"):
        make(jsonl, tmp_path / "none", max_skipped_share=1.0)
    jsonl.write_bytes(b"\n")
    with pytest.raises(SampleError, match="no sample in it"):
        make(jsonl, out)
    with pytest.raises(ConfigError, match="no such file"):
        make(tmp_path / "x", out)
    jsonl.write_bytes(row())
    make(jsonl, out)
    jsonl.write_bytes(row() + b"\n" + row())
    message = "not empty, and made from something else: sha256 of the JSONL was"
    with pytest.raises(ConfigError, match=message):
        make(jsonl, out)
    (out / MADE_NAME).unlink()
    with pytest.raises(ConfigError, match="not empty; give a folder that does not exist"):
        make(jsonl, out)


def test_options_out_of_range_are_named():
    for name, value, message in (
        ("samples_per_shard", 0, "--samples-per-shard 0: expected at least 1"),
        ("max_skipped", -1, "--max-skipped -1"),
        ("max_skipped_share", 1.5, "--max-skipped-share 1.5: expected a share"),
        ("num_workers", 0, "--workers 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            WriterOptions(**{name: value})


def wait_until(condition, what):
    """What another process does is seen only by looking."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["workers", "all"])
def test_making_goes_on_after_a_kill(tmp_path, make, killed, monkeypatch):
    jsonl = write_conversations(tmp_path / "raw", num_samples=12)
    make(jsonl, tmp_path / "whole", samples_per_shard=4)
    out, held = tmp_path / "out", (jsonl.parent / "004_0.png").read_bytes()
    open_image = tiling.open_image

    def open_or_wait(content):
        if content == held:  # of the second run of lines
            signal.pause()
        return open_image(content)

    maker = multiprocessing.get_context("fork").Process(
        target=expect_a_killed_worker,
        args=(lambda: make(jsonl, out, samples_per_shard=4, num_workers=2),),
    )
    with monkeypatch.context() as patch:
        patch.setattr(tiling, "open_image", open_or_wait)
        maker.start()
    half = tmp_path / "out.incomplete"
    wait_until(lambda: len([*half.glob("journal/*.json")]) == 2, "two finished runs")
    workers = psutil.Process(maker.pid).children(recursive=True)
    assert len(workers) >= 1  # the one that wrote both runs may have ended
    for process in workers if killed == "workers" else [maker]:
        process.kill()
    maker.join(TIMEOUT_S)
    assert maker.exitcode == (0 if killed == "workers" else -signal.SIGKILL)
    assert psutil.wait_procs(workers, timeout=TIMEOUT_S)[1] == []
    assert not out.exists()
    (half / "shard-000001.npz").write_bytes(b"half")  # of an unfinished run
    finished = {path.name: path.stat() for path in half.glob("shard-00000[02].*")}
    assert len(finished) == 4
    with pytest.raises(ConfigError, match=r"out.incomplete: .*--samples-per-shard was 4, now 5"):
        make(jsonl, out, samples_per_shard=5)
    make(jsonl, out, samples_per_shard=4)
    assert content(out) == content(tmp_path / "whole")
    for name, before in finished.items():  # not made a second time
        after = (out / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def expect_a_killed_worker(make):
    message = r"one of 2 worker processes was killed.*finished work is kept.*fewer --workers"
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_finished_run_whose_files_are_gone_is_made_again(tmp_path, make):
    jsonl = with_broken_lines(tmp_path / "raw", num_samples=12, broken={12})
    make(jsonl, tmp_path / "whole", samples_per_shard=4, max_skipped=1)
    with pytest.raises(SampleError):
        make(jsonl, tmp_path / "out", samples_per_shard=4)
    half = tmp_path / "out.incomplete"
    (half / "shard-000000.tar").write_bytes(b"cut short")
    (half / "shard-000001.npz").unlink()
    make(jsonl, tmp_path / "out", samples_per_shard=4, max_skipped=1)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_half_made_folder_has_one_maker_and_one_recipe(tmp_path, make):
    jsonl = with_broken_lines(tmp_path / "raw", num_samples=2, broken=set())
    journal = tmp_path / "out.incomplete" / JOURNAL_NAME
    journal.mkdir(parents=True)
    with (journal / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is making it"):
            make(jsonl, tmp_path / "out")
    # Nothing was finished yet, so that nothing is lost.
    (journal.parent / MADE_NAME).write_text('{"root": "b"}')
    make(jsonl, tmp_path / "out")


@pytest.fixture
def meta(tmp_path):
    """Three data sets: text in CRLF with a BOM, images in a tar, videos as frames."""
    roots = {name: tmp_path / name for name in ("text", "tar", "video")}
    for root in roots.values():
        root.mkdir()
    jsonls = {name: root / "train.jsonl" for name, root in roots.items()}
    words = [row(question="Sag \u00fc."), b"", row(question="Say b.")]
    jsonls["text"].write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(words))
    pictures = {f"in/\u00e9{i}.jpg": picture((i, 0, 0), kind="JPEG") for i in range(4)}
    write_tar(roots["tar"] / "images.tar", pictures)
    jsonls["tar"].write_bytes(b"\n".join(row(image=name) for name in pictures))
    for name, number in (("a", 3), ("b", 40)):
        frames_of(roots["video"], name, number=number)
    jsonls["video"].write_bytes(b"\n".join(row(video=name) for name in "ab"))
    tar = {"data_augment": True, "max_dynamic_patch": 2, "repeat_time": 0.5, "length": 5}
    fields = {
        "texte-\u00fc": ("text", {"root": "", "repeat_time": 2}),
        "tar.1": ("tar", {"root": str(roots["tar"] / "images.tar"), **tar}),
        "video": ("video", {"root": str(roots["video"]), "length": 2}),
    }
    sets = {name: {"annotation": str(jsonls[of]), **more} for name, (of, more) in fields.items()}
    (tmp_path / "meta.json").write_text(json.dumps(sets))
    return tmp_path / "meta.json"


@pytest.fixture
def make_all(meta, tokenizer):
    return functools.partial(make_mixture, meta, tokenizer=tokenizer, settings=SETTINGS)


def test_an_official_meta_becomes_a_mixture(tmp_path, make_all):
    out = tmp_path / "out"
    options = WriterOptions(samples_per_shard=2, num_workers=2, show_progress=False)
    folders = make_all(out_dir=out, options=options)
    assert json.loads((out / "mixture.json").read_bytes()) == {
        "version": 1,
        "folders": [
            {"path": "texte-\u00fc", "repeat": 2.0},
            {"path": "tar.1", "repeat": 0.5},
            {"path": "video", "repeat": 1.0},
        ],
    }
    assert [folder.warning for folder in folders] == [
        None,
        "tar.1: the meta JSON says length 5, but there are 4 lines",
        None,
    ]
    text, tar, video = (ShardFolder.open(folder.path) for folder in folders)
    keys = [key for folder in folders for key in keys_of(folder.path)]
    assert keys[:3] == ["texte-\u00fc-00000001", "texte-\u00fc-00000003", "tar_1-00000001"]
    assert len(set(keys)) == 8
    assert text.read(0).turns[0].text == "Sag \u00fc."
    for number in range(4):
        sample = tar.read(number)
        assert (sample.max_dynamic_patch, sample.data_augment) == (2, True)
        assert sample.images == (picture((number, 0, 0), kind="JPEG"),)
    assert [sample.max_dynamic_patch for sample in map(video.read, range(2))] == [1, 1]
    assert video.num_tiles.tolist()[0] == 3
    assert 8 <= video.num_tiles.tolist()[1] <= 32
    assert video.read(0).turns[0].text.startswith("Frame-1: <image>\nFrame-2: <image>\n")


def test_a_mixture_goes_on_and_refuses_what_differs(tmp_path, make_all, meta, tokenizer):
    out, quiet = tmp_path / "out", WriterOptions(show_progress=False)
    (tmp_path / "video/train.jsonl").write_bytes(row(video="a") + b"\n" + row(video="none"))
    with pytest.raises(SampleError, match=r"broken video: .*train.jsonl:2"):
        make_all(out_dir=out, options=quiet)
    assert not (out / "mixture.json").exists()
    begun = (out / "tar.1.incomplete" / "shard-000000.tar").stat().st_ino
    frames_of(tmp_path / "video", "none", number=9)
    make_all(out_dir=out, options=quiet)
    assert (out / "tar.1" / "shard-000000.tar").stat().st_ino == begun
    before = {path: content(path) for path in out.iterdir() if path.is_dir()}
    make_all(out_dir=out, options=quiet)  # there is nothing left to do
    assert {path: content(path) for path in out.iterdir() if path.is_dir()} == before
    sets = json.loads(meta.read_bytes())
    sets["tar.1"]["max_dynamic_patch"] = 3
    meta.write_text(json.dumps(sets))
    with pytest.raises(ConfigError, match=r"tar.1: .*data set's max_dynamic_patch was 2, now 3"):
        make_all(out_dir=out, options=quiet)


def test_another_seed_takes_other_frames(tmp_path, meta, tokenizer, capsys):
    command = (
        f"make --meta {meta} --tokenizer-model {tokenizer.source} --model-size toy --workers 1"
        " --min-num-frame 4"
    )
    for seed in (1, 2):
        main(f"{command} --seed {seed} --out {tmp_path / str(seed)}".split())
    shown = capsys.readouterr().out
    assert "warning: tar.1: the meta JSON says length 5, but there are 4 lines" in shown
    assert "train on all of them with --data-path" in shown
    assert "0 left out" in shown
    video = [content(tmp_path / seed / "video")["shard-000000.tar"] for seed in "12"]
    tar = [content(tmp_path / seed / "tar.1")["shard-000000.tar"] for seed in "12"]
    assert video[0] != video[1]
    assert tar[0] == tar[1]
    with pytest.raises(ConfigError, match="--image-root has no effect with --meta"):
        main(f"{command} --image-root / --out {tmp_path / 'x'}".split())
