"""`verify`: a whole folder has no problem; each kind of damage is reported where it is, and nothing
else is."""

import io
import json
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest

from megatron_vico.data.pack.packing import PackLimits
from megatron_vico.data.shards.index import INDEX_NAME, FolderIndex, ShardIndex, hash_of_file
from megatron_vico.data.shards.reader import ShardFolder
from megatron_vico.errors import ConfigError
from megatron_vico.shard_tools.pool import Progress
from megatron_vico.shard_tools.shard_check import Problem, VerifyOptions
from megatron_vico.shard_tools.verify import Verification
from tests.unit.conftest import NUM_SAMPLES

SECOND = "shard-000001"
KEYS = [f"conversations-{number:08d}" for number in range(1, NUM_SAMPLES + 1)]
"""16 in the first shard, 16 in the second, 10 in the third."""


@pytest.fixture
def copy(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "shards")


def problems_of(*paths, **options):
    found = Verification(paths, VerifyOptions(**options))
    return [each for each in found if isinstance(each, Problem)]


def facts(problems):
    return [
        (problem.cause, problem.file, problem.samples, problem.num_samples) for problem in problems
    ]


def relist(folder):
    """Write hashes and sizes of the files as they are now, so that only their content can be found
    wrong."""
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


def overwrite(path, offset, content):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def change_index(folder, **columns):
    path = folder / f"{SECOND}.npz"
    replace(ShardIndex.read(path), **columns).write(path)
    relist(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_whole_folder_has_no_problem_and_every_byte_and_sample_is_counted(
    shards, tokenizer, workers
):
    limits = PackLimits(capacity=4096, max_tiles=96)
    check = Verification(
        [shards, shards],
        VerifyOptions(tokenizer=tokenizer, limits=limits, tokens_kept=16, num_workers=workers),
    )
    findings = list(check)
    assert {type(finding) for finding in findings} == {Progress}
    assert sum(finding.num_samples for finding in findings) == NUM_SAMPLES
    size = sum(path.stat().st_size for path in shards.glob("*.tar"))
    assert sum(finding.num_bytes for finding in findings) == check.num_bytes == size
    assert check.num_shards == 3


def test_a_share_of_the_samples_is_read(shards):
    findings = list(Verification([shards], VerifyOptions(sample_share=0.25)))
    assert sum(finding.num_samples for finding in findings) == 4 + 4 + 2
    with pytest.raises(ConfigError, match="--sample-share 2"):
        Verification([shards], VerifyOptions(sample_share=2))


def test_a_tar_cut_at_any_block_names_the_lost_samples(copy):
    tar = copy / f"{SECOND}.tar"
    whole, index = tar.read_bytes(), ShardIndex.read(copy / f"{SECOND}.npz")
    ends = [max(offset + size for offset, size in index[number].members) for number in range(16)]
    for size in range(0, len(whole), 512):
        tar.write_bytes(whole[:size])
        lost = [key for key, end in zip(KEYS[16:32], ends, strict=True) if end > size]
        expected = [("wrong size", tar.name, "", 0)]
        if lost:
            name = lost[0] if len(lost) == 1 else f"{lost[0]} .. {lost[-1]}"
            expected.append(("sample cut off", tar.name, name, len(lost)))
        assert facts(problems_of(copy)) == expected


def test_a_missing_tar_names_its_samples(copy):
    (copy / f"{SECOND}.tar").unlink()
    assert facts(problems_of(copy)) == [
        ("missing file", f"{SECOND}.tar", f"{KEYS[16]} .. {KEYS[31]}", 16)
    ]


def test_a_replaced_tar_is_unlike_its_index(copy):
    shutil.copy(copy / "shard-000000.tar", copy / f"{SECOND}.tar")
    found = facts(problems_of(copy))
    assert found[0][0] in ("wrong size", "changed content")
    assert found[1:] == [
        ("tar unlike index", f"{SECOND}.tar", f"{KEYS[0]} .. {KEYS[15]}", 16),
        ("tar unlike index", f"{SECOND}.tar", f"{KEYS[16]} .. {KEYS[31]}", 16),
    ]


def test_one_changed_byte_is_found_by_its_hash(copy):
    index = ShardIndex.read(copy / f"{SECOND}.npz")
    tar = copy / f"{SECOND}.tar"
    overwrite(tar, tar.read_bytes().index(b"few", index[3].members[0][0]), b"FEW")
    assert facts(problems_of(copy)) == [("changed content", f"{SECOND}.tar", "", 0)]


def test_broken_text_and_images_are_named(copy, tokenizer):
    index = ShardIndex.read(copy / f"{SECOND}.npz")
    tar = copy / f"{SECOND}.tar"
    overwrite(tar, index[0].members[0][0], b"!")
    overwrite(tar, index[2].members[1][0], b"no PNG at all")
    overwrite(tar, index[2].members[2][0], b"no PNG at all")
    relist(copy)
    expected = [
        ("unreadable sample", tar.name, KEYS[16], 1),
        ("broken image", tar.name, KEYS[18], 1),
        ("broken image", tar.name, KEYS[18], 1),
    ]
    for problems in (problems_of(copy), problems_of(copy, tokenizer=tokenizer)):
        assert facts(problems) == expected
        assert problems[1].found.startswith("image 0 (")
        assert problems[2].found.startswith("image 1 (")
        assert problems[2].found.endswith(" bytes) cannot be decoded: no image file")
    assert str(problems[0]).startswith(
        f"{tar}: sample {KEYS[16]}: unreadable sample: broken JSON ("
    )


def test_a_conversation_that_cannot_be_trained_is_named_only_with_a_tokenizer(copy, tokenizer):
    tar = copy / f"{SECOND}.tar"
    offset, size = ShardIndex.read(copy / f"{SECOND}.npz")[2].members[0]
    overwrite(
        tar, offset, tar.read_bytes()[offset : offset + size].replace(b"<image>", b"(image)", 1)
    )
    relist(copy)
    assert problems_of(copy) == []
    (problem,) = problems_of(copy, tokenizer=tokenizer)
    assert facts([problem]) == [("broken conversation", tar.name, KEYS[18], 1)]
    assert problem.found == "1 <image> tags but 2 images"


def test_counts_unlike_the_index_are_named_only_with_a_tokenizer(copy, tokenizer):
    index = ShardIndex.read(copy / f"{SECOND}.npz")
    tokens, trained, tiles = (
        index.num_tokens.copy(),
        index.num_responses.copy(),
        index.tiles_per_image.copy(),
    )
    tokens[1] += 1
    trained[4] -= 1
    tiles[-1] += 1  # of the last but one sample: the last has no image
    change_index(copy, num_tokens=tokens, num_responses=trained, tiles_per_image=tiles)
    assert problems_of(copy) == []
    problems = problems_of(copy, tokenizer=tokenizer)
    assert facts(problems) == [("wrong counts", f"{SECOND}.tar", KEYS[n], 1) for n in (17, 20, 30)]
    assert problems[0].found.startswith(f"{tokens[1] - 1} tokens, ")
    assert problems[0].expected.startswith(f"{tokens[1]} tokens, ")


def test_offsets_that_do_not_fit_the_tar_are_named(copy):
    index = ShardIndex.read(copy / f"{SECOND}.npz")
    members = index.members.copy()
    members[index.member_starts[5], 0] += 512
    members[index.member_starts[9] : index.member_starts[11], 1] += 1
    change_index(copy, members=members)
    assert facts(problems_of(copy)) == [
        ("tar unlike index", f"{SECOND}.tar", KEYS[21], 1),
        ("tar unlike index", f"{SECOND}.tar", f"{KEYS[25]} .. {KEYS[26]}", 2),
    ]


def test_samples_behind_a_broken_header_are_named_and_still_read(copy):
    index = ShardIndex.read(copy / f"{SECOND}.npz")
    tar = copy / f"{SECOND}.tar"
    overwrite(tar, min(index[5].members)[0] - 512, b"\1" * 512)
    overwrite(tar, index[8].members[0][0], b"!")
    relist(copy)
    problems = problems_of(copy)
    assert facts(problems) == [
        ("tar unlike index", tar.name, f"{KEYS[21]} .. {KEYS[31]}", 11),
        ("unreadable sample", tar.name, KEYS[24], 1),
    ]
    end = max(
        offset + size for offset, size in index[4].members
    )  # of the last sample with a header
    assert problems[0].found == f"no header at byte {-(-end // 512) * 512}"


def test_a_sample_that_the_index_lacks_is_named(copy):
    with tarfile.open(copy / f"{SECOND}.tar", "a") as tar:
        header = tarfile.TarInfo("extra.json")
        header.size = 2
        tar.addfile(header, io.BytesIO(b"{}"))
    relist(copy)
    assert facts(problems_of(copy)) == [("tar unlike index", f"{SECOND}.tar", "extra", 1)]


def test_an_index_that_is_broken_missing_or_changed_is_named(copy):
    path = copy / f"{SECOND}.npz"
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        assert facts(problems_of(copy)) == [("broken index", path.name, "", 0)]
    index = ShardIndex.read(copy / "shard-000002.npz")
    index.write(path)
    assert facts(problems_of(copy)) == [("broken index", path.name, "", 0)]  # 10 samples, not 16
    path.write_bytes(whole)
    index = ShardIndex.read(path)
    replace(index, num_responses=index.num_responses[:-1]).write(path)
    assert facts(problems_of(copy)) == [("broken index", path.name, "", 0)]
    replace(index, num_tokens=index.num_tokens + 1).write(path)
    assert facts(problems_of(copy)) == [("changed content", path.name, "", 0)]
    path.unlink()
    assert facts(problems_of(copy)) == [("missing file", path.name, "", 0)]
    (copy / f"{SECOND}.tar").unlink()
    assert [fact[:2] for fact in facts(problems_of(copy))] == [
        ("missing file", path.name),
        ("missing file", f"{SECOND}.tar"),
    ]


def test_a_broken_folder_does_not_hide_the_next(copy, shards, tmp_path):
    (copy / INDEX_NAME).write_text(json.dumps({"version": 2}))
    (tmp_path / "empty").mkdir()
    problems = problems_of(copy, tmp_path / "empty", tmp_path / "nowhere", shards)
    assert [(problem.cause, problem.folder) for problem in problems] == [
        ("broken index", str(path)) for path in (copy, tmp_path / "empty", tmp_path / "nowhere")
    ]


def test_a_file_that_cannot_be_read_does_not_hide_the_next(copy):
    (copy / f"{SECOND}.tar").unlink()
    (copy / f"{SECOND}.tar").mkdir()
    (copy / "shard-000002.tar").unlink()
    assert [fact[:2] for fact in facts(problems_of(copy))] == [
        ("unreadable file", f"{SECOND}.tar"),
        ("missing file", "shard-000002.tar"),
    ]


def test_a_file_that_is_not_listed_is_named(copy):
    (copy / "shard-000003.tar").write_bytes(b"")
    assert facts(problems_of(copy)) == [("file not listed", "shard-000003.tar", "", 0)]


def test_another_tokenizer_is_one_problem_and_its_counts_are_not_compared(copy, tokenizer):
    replace(FolderIndex.read(copy), tokenizer="0123").write(copy)
    (problem,) = problems_of(copy, tokenizer=tokenizer)
    assert problem.cause == "other tokenizer"
    assert tokenizer.fingerprint in problem.found
    assert "0123" in problem.expected


def test_samples_too_large_for_a_pack_are_named(shards):
    folder = ShardFolder.open(shards)
    lengths = folder.num_tokens + 15 * folder.num_tiles
    limits = PackLimits(capacity=int(np.sort(lengths)[-3]), max_tiles=10_000)
    expected = [KEYS[n] for n in np.flatnonzero(lengths > limits.capacity)]
    assert 1 <= len(expected) <= 2
    problems = problems_of(shards, limits=limits, tokens_kept=16)
    assert [(problem.cause, problem.samples) for problem in problems] == [
        ("too large for a pack", k) for k in expected
    ]
    limits = PackLimits(capacity=10_000, max_tiles=int(folder.num_tiles.max()) - 1)
    expected = [KEYS[n] for n in np.flatnonzero(folder.num_tiles > limits.max_tiles)]
    assert (
        [problem.samples for problem in problems_of(shards, limits=limits, tokens_kept=16)]
        == expected
        != []
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_keys_that_come_again_are_named_over_all_folders(shards, copy, workers):
    problems = problems_of(shards, copy, num_workers=workers)
    assert facts(problems) == [
        ("duplicate key", f"shard-00000{n}.tar", f"{KEYS[start]} .. {KEYS[end]}", end + 1 - start)
        for n, (start, end) in enumerate([(0, 15), (16, 31), (32, 41)])
    ]
    assert {problem.folder for problem in problems} == {str(copy)}
    assert problems[2].found == f"also in {shards / 'shard-000002.tar'}"


def test_a_key_twice_in_one_folder_is_named(copy):
    first = ShardIndex.read(copy / "shard-000000.npz")
    index = ShardIndex.read(copy / f"{SECOND}.npz")
    keys = index.keys.copy()
    keys[7] = first.keys[2]
    change_index(copy, keys=keys)
    found = facts(problems_of(copy))
    assert ("duplicate key", f"{SECOND}.tar", KEYS[2], 1) in found
    assert {cause for cause, *_ in found} == {"duplicate key", "tar unlike index"}


def test_a_problem_is_one_line():
    problem = Problem(
        cause="unreadable sample",
        folder="/d",
        file="s.tar",
        samples="k",
        num_samples=1,
        found="a\nb",
        expected="c",
    )
    assert str(problem) == "/d/s.tar: sample k: unreadable sample: a b; expected c"
