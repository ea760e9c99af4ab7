"""Damage anywhere on the way of reading is named or harmless: no wrong sample, and no error but the
two of users."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from megatron_vico.data.encode.sample_encoder import SampleEncoder
from megatron_vico.data.samples import ConversationSample, Turn
from megatron_vico.data.shards.index import FolderIndex, ShardIndex
from megatron_vico.data.shards.reader import ShardFolder
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.shard_tools.journal import MADE_NAME
from megatron_vico.shard_tools.options import WriterOptions
from megatron_vico.shard_tools.writer import make_shards
from tests.toy_data import write_conversations
from tests.unit.conftest import SETTINGS

TAR, NPZ = "shard-000001.tar", "shard-000001.npz"
ROOT = Path(__file__).parents[3]


def made(folder, *, tokenizer, seed=0):
    """Two shards of three samples, their text not all ASCII."""
    jsonl = write_conversations(
        folder / "source", num_samples=6, seed=seed, images_per_sample=(1, 0, 2)
    )
    jsonl.write_text(jsonl.read_text().replace("few words", "\u5c11\u6570\u8bcd"), encoding="utf-8")
    make_shards(
        jsonl,
        image_root=jsonl.parent,
        out_dir=folder / "shards",
        tokenizer=tokenizer,
        settings=SETTINGS,
        options=WriterOptions(samples_per_shard=3, show_progress=False),
    )
    return folder / "shards"


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory):
    return made(tmp_path_factory.mktemp("whole"), tokenizer=tokenizer)


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "shards")


def read_all(folder):
    """Each sample, or what is said of it."""
    found = []
    for number in range(len(folder)):
        try:
            found.append(folder.read(number))
        except SampleError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_tar_cut_anywhere(copy, scheme):
    files = fsspec.filesystem("memory" if scheme else "file")
    if scheme:
        files.put(f"{copy}/", f"{copy}/", recursive=True)
    tar, url = f"{copy}/{TAR}", f"{scheme}{copy}"
    content, folder = files.cat_file(tar), ShardFolder.open(url)
    right = read_all(folder)
    assert all(isinstance(sample, ConversationSample) for sample in right)
    lost = []
    for cut in [*range(0, len(content), 512), 1, 511, 513, 1500, len(content) - 1]:
        files.pipe_file(tar, content[:cut])
        with pytest.raises(
            SampleError, match=f"{TAR}: {cut} bytes, but the index says {len(content)}"
        ):
            ShardFolder.open(url)
        # A run that has the folder open meets the cut when it reads.
        found = read_all(folder)
        assert found[:3] == right[:3]
        assert all(sample == was or TAR in sample for sample, was in zip(found, right, strict=True))
        lost.append(sum(isinstance(sample, str) for sample in found))
    assert set(lost) == {0, 1, 2, 3}


def test_a_tar_of_another_sample_order_or_folder(copy, tokenizer, tmp_path):
    other = made(tmp_path / "other", tokenizer=tokenizer, seed=1)
    tars = [copy / "shard-000000.tar", copy / TAR]
    contents = [tar.read_bytes() for tar in tars]
    folder = ShardFolder.open(copy)
    # Swapped while the run has them open, so that not even their size is seen.
    for tar, content in zip(tars, reversed(contents), strict=True):
        tar.write_bytes(content)
    assert all("the file is not the one that was indexed" in sample for sample in read_all(folder))
    shutil.copy(other / NPZ, copy / NPZ)
    for tar, content in zip(tars, contents, strict=True):
        tar.write_bytes(content)
    with pytest.raises(
        SampleError, match=rf"{NPZ}: not the one that index.json lists \(sha256 differs\)"
    ):
        ShardFolder.open(copy)
    shutil.copy(other / "index.json", copy / "index.json")
    with pytest.raises(SampleError):
        ShardFolder.open(copy)


@pytest.mark.parametrize("name", ["shard-000000.tar", TAR, "shard-000000.npz", NPZ])
def test_a_missing_file(copy, name):
    folder = ShardFolder.open(copy)
    (copy / name).unlink()
    with pytest.raises(SampleError, match=f"{name}: missing, though index.json lists it"):
        ShardFolder.open(copy)
    lost = [sample for sample in read_all(folder) if isinstance(sample, str)]
    assert len(lost) == (3 if name.endswith("tar") else 0)
    assert all(f"{name} is missing" in message for message in lost)


def test_a_tar_that_is_a_folder(copy):
    folder = ShardFolder.open(copy)
    (copy / TAR).unlink()
    (copy / TAR).mkdir()
    assert all(TAR in sample for sample in read_all(folder)[3:])
    with pytest.raises(SampleError, match=TAR):
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
    assert ShardFolder.open(copy).samples_per_shard == (3, len(right))


def test_the_index_of_the_folder_cut_anywhere(copy):
    content = (copy / "index.json").read_bytes()
    FolderIndex.parse(content, where="x")
    for cut in range(len(content)):
        with pytest.raises(SampleError, match=r"x/index.json: broken index"):
            FolderIndex.parse(content[:cut], where="x")
    for wrong in (b"[]", b"3", b'"text"', b"null", b"{}", b"\xff\xfe"):
        with pytest.raises(SampleError, match=r"x/index.json: broken index"):
            FolderIndex.parse(wrong, where="x")


def changed(fields):
    """The content of index.json with one field missing, too many or of another type."""
    for path in ((), ("settings",), ("shards", 0)):
        for name in (*_at(fields, path), "unknown"):
            for value in (..., None, 7, "x", [], {}, [3]):
                wrong = json.loads(json.dumps(fields))
                part = _at(wrong, path)
                if value is ...:
                    part.pop(name, None)
                    part |= {"unknown": 1} if name == "unknown" else {}
                else:
                    part[name] = value
                if wrong != fields:
                    yield (*path, name, value), wrong


def _at(fields, path):
    for step in path:
        fields = fields[step]
    return fields


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
    # Messages, a hash that only verify="sha256" looks at, and two whose default is right here.
    assert passed == {"skipped", "sha256", "use_thumbnail", "tile_tags"}


def encoded(kind, mode="RGB", size=(40, 30)):
    written = io.BytesIO()
    pixels = np.random.default_rng(0).integers(
        0, 256, (size[1], size[0], len(mode)), dtype=np.uint8
    )
    Image.frombytes(mode, size, pixels.tobytes()).save(written, kind)
    return written.getvalue()


def png_of_size(width, height):
    """A PNG that says it is this large, and has no pixels."""
    png = bytearray(encoded("PNG"))
    png[16:24] = struct.pack(">II", width, height)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    return bytes(png)


JPEG = encoded("JPEG")
BROKEN = {
    "cut": [JPEG[:cut] for cut in range(0, len(JPEG) - 2, 97)],
    "garbage": [
        bytes(1000),
        np.random.default_rng(0).bytes(1000),
        JPEG[:300] + bytes(300),
        b"\xff\xd8\xff\xe0",
    ],
    "text": [b"not an image", b"<html>404</html>"],
    "huge": [png_of_size(60_000, 60_000), png_of_size(2**31 - 1, 2**31 - 1), png_of_size(0, 5)],
}
UNUSUAL = {
    "png named jpg": encoded("PNG"),
    "CMYK": encoded("JPEG", "CMYK"),
    "grey": encoded("JPEG", "L"),
    "with alpha": encoded("PNG", "RGBA"),
    "one pixel": encoded("PNG", size=(1, 1)),
    "flat": encoded("PNG", size=(2000, 1)),
    "gif": encoded("GIF"),
    "webp": encoded("WEBP"),
}


def encode(image, tokenizer):
    turns = (Turn("human", "<image>\nWhat?"), Turn("gpt", "red"))
    sample = ConversationSample(key="the-key", turns=turns, images=(image,))
    return SampleEncoder(tokenizer=tokenizer, settings=SETTINGS).encode(sample)


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_broken_image_is_named(kind, tokenizer):
    for image in BROKEN[kind]:
        with pytest.raises(SampleError, match=r"sample 'the-key': image 0 .* cannot be decoded"):
            encode(image, tokenizer)


@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_image_is_read_by_its_content(kind, tokenizer):
    whole = encode(UNUSUAL[kind], tokenizer)
    with Image.open(io.BytesIO(UNUSUAL[kind])) as image:
        right = io.BytesIO()
        image.convert("RGB").save(right, "PNG")
    assert np.array_equal(whole.tiles, encode(right.getvalue(), tokenizer).tiles)
    assert whole.num_tiles >= 1


def test_a_jpeg_with_flipped_bytes_is_decoded_or_named(tokenizer):
    outcomes = set()
    for position in range(0, len(JPEG), 11):
        flipped = bytearray(JPEG)
        flipped[position] ^= 0xFF
        try:
            outcomes.add(encode(bytes(flipped), tokenizer).tiles.dtype.name)
        except SampleError:
            outcomes.add("named")
    assert outcomes == {"uint8", "named"}


MAKE = """
import os, sys
from megatron_vico.shard_tools.options import WriterOptions
from megatron_vico.shard_tools.writer import make_shards
from megatron_vico.data.encode.tokenizer import load_tokenizer
from tests.unit.conftest import SETTINGS
os.umask(0o077)
jsonl, model, out = sys.argv[1:]
make_shards(jsonl, image_root=os.path.dirname(jsonl), out_dir=out, tokenizer=load_tokenizer(model),
            settings=SETTINGS, options=WriterOptions(samples_per_shard=3, show_progress=False))
"""


@pytest.mark.slow  # a process of its own
def test_clock_locale_hash_seed_and_umask_change_nothing(whole, tokenizer, tmp_path):
    source = shutil.copytree(
        whole.parent / "source", tmp_path / "source", copy_function=shutil.copyfile
    )
    for file in source.iterdir():
        os.utime(file, (1, 1))
    # A real ASCII locale: Python would put UTF-8 in its place.
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "TZ": "Asia/Kathmandu"}
    subprocess.run(
        [
            sys.executable,
            "-c",
            MAKE,
            str(source / "conversations.jsonl"),
            tokenizer.source,
            str(tmp_path / "out"),
        ],
        env={**os.environ, **locale, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        check=True,
    )
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(names) == 6
    for name in sorted(set(names) - {MADE_NAME}):  # that one says where the input is
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()
