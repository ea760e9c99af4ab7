"""Damage is named by every command that meets it, or harmless: no wrong sample, no other error."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import reduce
from operator import getitem
from pathlib import Path

import fsspec
import numpy as np
import pytest

from megatron_vico.config.schema import DataOptions
from megatron_vico.data.samples import ConversationSample
from megatron_vico.data.shards.index import FolderIndex, ShardIndex
from megatron_vico.data.shards.reader import ShardFolder
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.shard_tools.made_folder import MADE_NAME
from megatron_vico.shard_tools.reindex import index_shards
from megatron_vico.shard_tools.tar import members_of
from tests.folder_state import state_of
from tests.toy_data import write_conversations
from tests.unit.conftest import SETTINGS
from tests.unit.shard_tools.damage import KEYS, NPZ, TABLE, TAR, facts, problems_of, relist

USER_ERRORS = (SampleError, ConfigError)
ROOT = Path(__file__).parents[3]


def read_all(folder):
    """Each sample, or what is said of it."""
    found = []
    for number in range(len(folder)):
        try:
            found.append(folder.read(number))
        except SampleError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("what", TABLE)
def test_each_command_names_each_damage(copy, shards, tokenizer, what):
    damage = TABLE[what]
    folder, right = ShardFolder.open(copy), read_all(ShardFolder.open(shards))
    damage.do(copy)
    before = state_of(copy)
    if damage.opened:
        with pytest.raises(USER_ERRORS, match=damage.opened):
            ShardFolder.open(copy)
    else:
        ShardFolder.open(copy)
    found = read_all(folder)
    unlike = [number for number, sample in enumerate(found) if sample != right[number]]
    lost = [number for number in unlike if isinstance(found[number], str)]
    assert lost == list(damage.lost)
    assert all(re.search(damage.read, found[number]) for number in lost)
    assert [number for number in unlike if number not in lost] == list(damage.changed)
    assert facts(problems_of(copy)) == list(damage.verify)
    assert set(damage.verify) <= set(facts(problems_of(copy, tokenizer=tokenizer)))
    assert state_of(copy) == before
    if damage.index:
        with pytest.raises((*USER_ERRORS, OSError), match=damage.index):
            index_shards(copy, tokenizer=tokenizer, settings=SETTINGS)
    else:
        index_shards(copy, tokenizer=tokenizer, settings=SETTINGS)
        assert len(ShardFolder.open(copy)) == damage.left
        assert "changed content" not in {each.cause for each in problems_of(copy)}
        if "index" in what and damage.left == len(folder):
            for path in shards.iterdir():
                assert (copy / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_tar_cut_anywhere(copy, scheme):
    files = fsspec.filesystem("memory" if scheme else "file")
    if scheme:
        files.put(f"{copy}/", f"{copy}/", recursive=True)
    tar, url = f"{copy}/{TAR}", f"{scheme}{copy}"
    content, folder = files.cat_file(tar), ShardFolder.open(url)
    right, index = read_all(folder), ShardIndex.read(copy / NPZ)
    assert all(isinstance(sample, ConversationSample) for sample in right)
    ends = [max(offset + size for offset, size in index[n].members) for n in range(len(index))]
    end_of_data = -(-max(ends) // 512) * 512
    for cut in [*range(0, len(content), 512), 1, 511, 513, 1500, len(content) - 1]:
        files.pipe_file(tar, content[:cut])
        message = f"{TAR}: {cut} bytes, but the index says {len(content)}"
        with pytest.raises(SampleError, match=message):
            ShardFolder.open(url)
        # A run that has the folder open meets the cut when it reads.
        found = read_all(folder)
        lost = [n for n, sample in enumerate(found) if isinstance(sample, str)]
        assert lost == [16 + n for n, end in enumerate(ends) if end > cut]
        assert all(TAR in found[n] for n in lost)
        assert all(found[n] == right[n] for n in range(len(folder)) if n not in lost)
        if scheme or cut % 512:
            continue
        expected = [("wrong size", TAR, "", 0)]
        if lost:
            keys = dict.fromkeys((KEYS[lost[0]], KEYS[lost[-1]]))
            expected.append(("sample cut off", TAR, " .. ".join(keys), len(lost)))
        assert facts(problems_of(copy)) == expected
        if cut < end_of_data + 1024:  # two blocks of zeros mark the end
            message = f"{TAR}: (not a complete tar file|sample .* lacks)"
            with pytest.raises(SampleError, match=message):
                members_of(copy / TAR)


def test_tars_that_change_places_and_files_of_another_folder(copy, shards, make, tmp_path):
    jsonl = write_conversations(tmp_path / "source", num_samples=42, seed=1)
    make(jsonl, tmp_path / "other", samples_per_shard=16)
    tars = [copy / "shard-000000.tar", copy / TAR]
    contents = [tar.read_bytes() for tar in tars]
    folder = ShardFolder.open(copy)
    # Swapped while the run has them open, so that not even their size is seen.
    for tar, content in zip(tars, reversed(contents), strict=True):
        tar.write_bytes(content)
    messages = read_all(folder)[:32]
    assert all("not the one that was indexed" in m or "ends after" in m for m in messages)
    for tar, content in zip(tars, contents, strict=True):
        tar.write_bytes(content)
    for name, message in ((NPZ, rf"{NPZ}: not the one that"), ("index.json", "sha256 differs")):
        shutil.copy(tmp_path / "other" / name, copy / name)
        with pytest.raises(SampleError, match=message):
            ShardFolder.open(copy)


def damaged(content):
    """Cuts and flipped bytes."""
    yield from (content[:cut] for cut in range(0, len(content), 64))
    yield content[:-1]
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 0xFF
        yield bytes(flipped)


def test_an_index_of_a_shard_cut_or_changed(copy):
    content = (copy / NPZ).read_bytes()
    right, refused = ShardIndex.parse(content, where=NPZ), 0
    for wrong in damaged(content):
        try:
            ShardIndex.parse(wrong, where=NPZ)
        except SampleError:
            refused += 1
    assert refused > len(content) / 2  # the rest does no harm or is found by the hash
    for wrong in list(damaged(content))[::37]:
        (copy / NPZ).write_bytes(wrong)
        with pytest.raises(SampleError, match=f"{NPZ}: not the one that index.json lists"):
            ShardFolder.open(copy)
    (copy / NPZ).write_bytes(content)
    assert ShardFolder.open(copy).samples_per_shard == (16, len(right), 10)


def test_the_index_of_the_folder_cut_anywhere(copy):
    content = (copy / "index.json").read_bytes()
    FolderIndex.parse(content, where="x")
    for cut in range(len(content)):
        with pytest.raises(SampleError, match=r"x/index.json: broken index"):
            FolderIndex.parse(content[:cut], where="x")
    for wrong in (b"[]", b"3", b'"text"', b"null", b"{}", b"\xff\xfe"):
        with pytest.raises(SampleError, match=r"x/index.json: broken index"):
            FolderIndex.parse(wrong, where="x")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("name", name) for name in ("../x.tar", "/x.tar", "a/x.tar", "x\0.tar", "..", "x")),
        *(("sha256", each) for each in ("../../victim", "", "0" * 63, "G" * 64, "0" * 64 + "\n")),
        *(("index_sha256", "../x"), ("num_bytes", -1), ("num_samples", -1)),
    ],
)
def test_an_index_names_no_file_elsewhere(copy, tmp_path, field, value):
    fields = json.loads((copy / "index.json").read_text())
    fields["shards"][1][field] = value
    (copy / "index.json").write_text(json.dumps(fields))
    (tmp_path / "victim.tar").write_text("mine")
    options = DataOptions(data_cache_dir=str(tmp_path / "cache" / "c"), data_cache_gb=1)
    for url in (copy, f"file://{copy}"):
        with pytest.raises(SampleError, match=r"index.json: broken index"):
            ShardFolder.open(url, options=options).read(16)
    assert (tmp_path / "victim.tar").read_text() == "mine"


ODD_COLUMNS = {
    "objects": lambda columns: columns.update(num_tokens=np.array([{}] * 16, dtype=object)),
    "floats": lambda columns: columns.update(num_tokens=columns["num_tokens"] * 1.0),
    "a column less": lambda columns: columns.pop("num_tokens"),
    "negative": lambda columns: columns.update(members=-columns["members"]),
    "huge": lambda columns: columns.update(tiles_per_image=columns["tiles_per_image"] + 2**60),
    "beyond the tar": lambda columns: columns.update(members=columns["members"] + 2**40),
    "flat": lambda columns: columns.update(members=columns["members"].ravel()),
    "text for keys": lambda columns: columns.update(keys=columns["keys"].astype(str)),
    "keys that are no text": lambda columns: columns.update(keys=np.array([b"\xff"] * 16)),
    "compressed": lambda columns: None,
}


@pytest.mark.parametrize("what", ODD_COLUMNS)
def test_odd_columns_of_an_index_whose_hash_is_right(copy, what):
    with np.load(copy / NPZ) as found:
        columns = dict(found)
    ODD_COLUMNS[what](columns)
    save = np.savez_compressed if what == "compressed" else np.savez
    with (copy / NPZ).open("wb") as file:
        save(file, **columns)
    relist(copy)
    with pytest.raises(SampleError, match=rf"{NPZ}: (broken index|members beyond)"):
        ShardFolder.open(copy)


def changed(fields):
    """The content of index.json with one field missing, too many or of another type."""
    for path in ((), ("settings",), ("shards", 0)):
        for name in (*reduce(getitem, path, fields), "unknown"):
            for value in (..., None, 7, "x", [], {}, [3]):
                wrong = json.loads(json.dumps(fields))
                part = reduce(getitem, path, wrong)
                if value is ...:
                    part.pop(name, None)
                    part |= {"unknown": 1} if name == "unknown" else {}
                else:
                    part[name] = value
                if wrong != fields:
                    yield (*path, name, value), wrong


def test_a_field_of_the_folder_index_missing_too_many_or_of_another_type(copy, tokenizer):
    fields = json.loads((copy / "index.json").read_text())
    right, passed = read_all(ShardFolder.open(copy)), set()
    for what, wrong in changed(fields):
        (copy / "index.json").write_text(json.dumps(wrong))
        try:
            folder = ShardFolder.open(copy)
            folder.check_encoding(tokenizer=tokenizer, settings=SETTINGS)
        except (SampleError, ConfigError):
            continue
        assert read_all(folder) == right, what
        passed.add(what[-2])
    # Messages, and two whose default is right here.
    assert passed == {"skipped", "use_thumbnail", "tile_tags"}


MAKE = """
import os, sys
from pathlib import Path
from megatron_vico.data.encode.tokenizer import load_tokenizer
from tests.unit.conftest import make
os.umask(0o077)
jsonl, model, out = sys.argv[1:]
make.__wrapped__(load_tokenizer(model))(Path(jsonl), Path(out), samples_per_shard=3)
"""


@pytest.mark.slow  # a process of its own
def test_clock_locale_hash_seed_and_umask_change_nothing(make, tokenizer, tmp_path):
    jsonl = write_conversations(tmp_path / "a", num_samples=6, images_per_sample=(1, 0, 2))
    # Not all ASCII.
    text = jsonl.read_text().replace("few words", "\u5c11\u6570\u8bcd")
    jsonl.write_text(text, encoding="utf-8")
    whole, out = tmp_path / "whole", tmp_path / "out"
    make(jsonl, whole, samples_per_shard=3)
    other = shutil.copytree(jsonl.parent, tmp_path / "b", copy_function=shutil.copyfile)
    for file in other.iterdir():
        os.utime(file, (1, 1))
    # A real ASCII locale: Python would put UTF-8 in its place.
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "TZ": "Asia/Kathmandu"}
    environment = {**os.environ, **locale, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", MAKE, other / jsonl.name, tokenizer.source, out]
    subprocess.run(words, env=environment, cwd=ROOT, check=True)
    names = {path.name for path in whole.iterdir()}
    assert names == {path.name for path in out.iterdir()}
    assert len(names) == 6
    for name in names - {MADE_NAME}:  # that one says where the input is
        assert (out / name).read_bytes() == (whole / name).read_bytes()
