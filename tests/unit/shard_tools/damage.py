"""What can be wrong with a copy of the shards, and what each command says of it."""

import io
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_vico.data.shards.index import INDEX_NAME, FolderIndex, ShardIndex, hash_of_file
from megatron_vico.shard_tools.shard_check import Problem, VerifyOptions
from megatron_vico.shard_tools.verify import Verification
from tests.unit.conftest import NUM_SAMPLES

TAR, NPZ = "shard-000001.tar", "shard-000001.npz"
"""Of the second shard, samples 16 to 31."""

KEYS = [f"conversations-{number:08d}" for number in range(1, NUM_SAMPLES + 1)]
SECOND = (f"{KEYS[16]} .. {KEYS[31]}", 16)


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing done to a folder, and what is to be said of it."""

    do: Callable[[Path], object]

    opened: str = ""
    """Error of `ShardFolder.open`."""

    read: str = ""
    """Error of the samples that a run which has the folder open cannot read any more."""

    lost: Sequence[int] = ()
    """These samples."""

    changed: Sequence[int] = ()
    """Samples that are read with other content: only a hash can see it."""

    verify: Sequence[tuple[str, str, str, int]] = ()
    """`facts` of the problems that `verify` finds."""

    index: str = ""
    """Error of `index_shards`; without one the folder is whole afterwards."""

    left: int = NUM_SAMPLES
    """Samples in it then."""


def problems_of(*paths, **options):
    found = Verification(paths, VerifyOptions(**options))
    return [each for each in found if isinstance(each, Problem)]


def facts(problems):
    return [(each.cause, each.file, each.samples, each.num_samples) for each in problems]


def relist(folder):
    """List the files as they are now, so that only their content can be found wrong."""
    index = FolderIndex.read(folder)
    shards = [
        replace(
            shard,
            num_bytes=(folder / shard.name).stat().st_size,
            sha256=hash_of_file(folder / shard.name),
            index_sha256=hash_of_file(folder / shard.index_name),
        )
        for shard in index.shards
    ]
    replace(index, shards=tuple(shards)).write(folder)


def overwrite(folder, offset, content):
    with (folder / TAR).open("r+b") as file:
        file.seek(offset)
        file.write(content)


def change_index(folder, change):
    """`change(index)` gives columns of the second shard's index; returns what they replaced."""
    index = ShardIndex.read(folder / NPZ)
    replace(index, **change(index)).write(folder / NPZ)
    return index


def member(folder, sample, number):
    """(offset, size) of a member of a sample of the second shard: its JSON, then its images."""
    return ShardIndex.read(folder / NPZ)[sample].members[number]


def append_sample(folder):
    with tarfile.open(folder / TAR, "a") as tar:
        header = tarfile.TarInfo("extra.json")
        header.size = 2
        tar.addfile(header, io.BytesIO(b"{}"))


def replace_in_index(old, new):
    def do(folder):
        text = (folder / INDEX_NAME).read_text()
        assert old in text
        (folder / INDEX_NAME).write_text(text.replace(old, new))

    return do


def make_a_folder_of(name):
    def do(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return do


def make_a_pipe_of(name):
    def do(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return do


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def break_header(folder):
    """And a text behind it: samples there are still read."""
    first = min(ShardIndex.read(folder / NPZ)[5].members)[0]
    overwrite(folder, first - 512, b"\1" * 512)
    overwrite(folder, member(folder, 8, 0)[0], b"!")


def move_members(index):
    members = index.members.copy()
    members[index.member_starts[5], 0] += 512
    members[index.member_starts[9] : index.member_starts[11], 1] += 1
    return {"members": members}


def repeat_key(index):
    keys = index.keys.copy()
    keys[7] = KEYS[2].encode()
    return {"keys": keys}


CHANGED = ("changed content", TAR, "", 0)
OTHER_CONTENT = ("changed content", NPZ, "", 0)
OTHER_INDEX = f"{NPZ}: not the one that index.json lists"
BROKEN_INDEX = [("broken index", NPZ, "", 0)]
BROKEN_FOLDER = [("broken index", INDEX_NAME, "", 0)]

TABLE = {
    "tar missing": Damage(
        do=remove(TAR),
        opened=f"{TAR}: missing, though index.json lists it",
        read=f"{TAR} is missing",
        lost=range(16, 32),
        verify=[("missing file", TAR, *SECOND)],
        left=26,
    ),
    "tar is a folder": Damage(
        do=make_a_folder_of(TAR),
        opened=TAR,
        read=TAR,
        lost=range(16, 32),
        verify=[("unreadable file", TAR, "", 0)],
        index="Is a directory",
    ),
    "tar is a pipe": Damage(
        do=make_a_pipe_of(TAR),
        opened=f"{TAR}: 0 bytes, but the index says",
        read=TAR,
        lost=range(16, 32),
        verify=[("unreadable file", TAR, "", 0)],
        index="not a plain file",
    ),
    "tar of another shard": Damage(
        do=lambda folder: shutil.copy(folder / "shard-000000.tar", folder / TAR),
        read=f"{TAR} has another member at byte|{TAR} ends after",
        lost=range(16, 32),
        verify=[
            CHANGED,
            ("tar unlike index", TAR, f"{KEYS[0]} .. {KEYS[15]}", 16),
            ("tar unlike index", TAR, *SECOND),
        ],
    ),
    "one word of a text": Damage(
        do=lambda folder: overwrite(
            folder, (folder / TAR).read_bytes().index(b"few", member(folder, 3, 0)[0]), b"FEW"
        ),
        changed=[19],
        verify=[CHANGED],
    ),
    "JSON broken": Damage(
        do=lambda folder: overwrite(folder, member(folder, 0, 0)[0], b"!"),
        read=r"broken JSON \(",
        lost=[16],
        verify=[CHANGED, ("unreadable sample", TAR, KEYS[16], 1)],
        index=r"broken JSON \(",
    ),
    "image broken": Damage(
        do=lambda folder: overwrite(folder, member(folder, 2, 1)[0], b"no PNG at all"),
        changed=[18],
        verify=[CHANGED, ("broken image", TAR, KEYS[18], 1)],
        index="image 0 .* cannot be decoded",
    ),
    "header broken": Damage(
        do=break_header,
        read=r"broken JSON \(",
        lost=[24],
        verify=[
            CHANGED,
            ("tar unlike index", TAR, f"{KEYS[21]} .. {KEYS[31]}", 11),
            ("unreadable sample", TAR, KEYS[24], 1),
        ],
        index=f"{TAR}: not a complete tar file",
    ),
    "a sample too many": Damage(
        do=append_sample,  # into the zeros at the end
        verify=[CHANGED, ("tar unlike index", TAR, "extra", 1)],
        index="sample 'extra': no list 'conversations'",
    ),
    "a tar too many": Damage(
        do=lambda folder: (folder / "shard-000003.tar").touch(),
        verify=[("file not listed", "shard-000003.tar", "", 0)],
        index=r"shard-000003.tar: not a complete tar file of samples \(empty file\)",
    ),
    "index missing": Damage(
        do=remove(NPZ), opened=f"{NPZ}: missing", verify=[("missing file", NPZ, "", 0)]
    ),
    "index and tar missing": Damage(
        do=remove(NPZ, TAR),
        opened=f"{TAR}: missing",
        read=f"{TAR} is missing",
        lost=range(16, 32),
        verify=[("missing file", NPZ, "", 0), ("missing file", TAR, "", 0)],
        left=26,
    ),
    "index is a pipe": Damage(
        do=make_a_pipe_of(NPZ), opened=f"{NPZ}.*not a plain file", verify=BROKEN_INDEX
    ),
    "index cut": Damage(
        do=lambda folder: os.truncate(folder / NPZ, 300), opened=OTHER_INDEX, verify=BROKEN_INDEX
    ),
    "index of another shard": Damage(
        do=lambda folder: shutil.copy(folder / "shard-000002.npz", folder / NPZ),
        opened=OTHER_INDEX,
        verify=BROKEN_INDEX,  # of 10 samples, not 16
    ),
    "index with a column too short": Damage(
        do=lambda folder: change_index(folder, lambda i: {"num_responses": i.num_responses[:-1]}),
        opened=OTHER_INDEX,
        verify=BROKEN_INDEX,
    ),
    "index of other counts": Damage(
        do=lambda folder: change_index(folder, lambda i: {"num_tokens": i.num_tokens + 1}),
        opened=OTHER_INDEX,
        verify=[OTHER_CONTENT],
    ),
    "index of other offsets": Damage(
        do=lambda folder: change_index(folder, move_members),
        opened=OTHER_INDEX,
        verify=[
            OTHER_CONTENT,
            ("tar unlike index", TAR, KEYS[21], 1),
            ("tar unlike index", TAR, f"{KEYS[25]} .. {KEYS[26]}", 2),
        ],
    ),
    "index with a key twice": Damage(
        do=lambda folder: change_index(folder, repeat_key),
        opened=OTHER_INDEX,
        verify=[
            OTHER_CONTENT,
            ("tar unlike index", TAR, KEYS[23], 1),
            ("tar unlike index", TAR, KEYS[2], 1),
            ("duplicate key", TAR, KEYS[2], 1),
        ],
    ),
    "index.json missing": Damage(
        do=remove(INDEX_NAME), opened="no index.json there", verify=BROKEN_FOLDER
    ),
    "index.json is a pipe": Damage(
        do=make_a_pipe_of(INDEX_NAME),
        opened=f"{INDEX_NAME}.*not a plain file",
        verify=BROKEN_FOLDER,
    ),
    "index.json nested 10,000 deep": Damage(
        do=lambda folder: (folder / INDEX_NAME).write_text("[" * 10_000),
        opened="broken index",
        verify=BROKEN_FOLDER,
    ),
    "index.json in UTF-16": Damage(
        do=lambda folder: (folder / INDEX_NAME).write_text("{}", encoding="utf-16"),
        opened="broken index",
        verify=BROKEN_FOLDER,
    ),
    "index.json cut": Damage(
        do=lambda folder: os.truncate(folder / INDEX_NAME, 100),
        opened="broken index",
        verify=BROKEN_FOLDER,
    ),
    "index.json of another version": Damage(
        do=replace_in_index('"version": 2', '"version": 1'),
        opened="index version 1, expected 2",
        verify=BROKEN_FOLDER,
    ),
}
