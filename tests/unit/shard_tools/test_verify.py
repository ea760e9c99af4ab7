"""`verify` finds nothing in a whole folder, and what is wrong where it is (see damage.py too)."""

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_vico.data.pack.packing import PackLimits
from megatron_vico.data.shards.index import INDEX_NAME, FolderIndex, ShardIndex
from megatron_vico.data.shards.reader import ShardFolder
from megatron_vico.errors import ConfigError
from megatron_vico.shard_tools.pool import Progress
from megatron_vico.shard_tools.shard_check import Problem, VerifyOptions
from megatron_vico.shard_tools.verify import Verification
from tests.unit.conftest import NUM_SAMPLES
from tests.unit.shard_tools.damage import (
    KEYS,
    NPZ,
    TAR,
    change_index,
    facts,
    make_a_folder_of,
    member,
    overwrite,
    problems_of,
    relist,
)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_whole_folder_has_no_problem_and_all_of_it_is_counted(shards, tokenizer, workers):
    limits = PackLimits(capacity=4096, max_tiles=96)
    options = VerifyOptions(tokenizer=tokenizer, limits=limits, tokens_kept=16, num_workers=workers)
    check = Verification([shards, shards], options)
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


def test_broken_text_and_images_are_named(copy, tokenizer):
    overwrite(copy, member(copy, 0, 0)[0], b"!")
    for image in (1, 2):
        overwrite(copy, member(copy, 2, image)[0], b"no PNG at all")
    relist(copy)
    for problems in (problems_of(copy), problems_of(copy, tokenizer=tokenizer)):
        text, first, second = problems
        assert facts([text]) == [("unreadable sample", TAR, KEYS[16], 1)]
        assert facts([first, second]) == [("broken image", TAR, KEYS[18], 1)] * 2
        assert first.found.startswith("image 0 (")
        assert second.found.startswith("image 1 (")
        assert second.found.endswith(" bytes) cannot be decoded: no image file")
    start = f"{copy / TAR}: sample {KEYS[16]}: unreadable sample: broken JSON ("
    assert str(text).startswith(start)


def test_what_cannot_be_trained_is_named_only_with_a_tokenizer(copy, tokenizer):
    offset, size = member(copy, 2, 0)
    text = (copy / TAR).read_bytes()[offset : offset + size]
    overwrite(copy, offset, text.replace(b"<image>", b"(image)", 1))

    def miscounted(index):
        names = ("num_tokens", "num_responses", "tiles_per_image")
        columns = {name: getattr(index, name).copy() for name in names}
        columns["num_tokens"][1] += 1
        columns["num_responses"][4] -= 1
        columns["tiles_per_image"][-1] += 1  # of the last but one sample: the last has no image
        return columns

    change_index(copy, miscounted)
    relist(copy)
    assert problems_of(copy) == []
    problems = problems_of(copy, tokenizer=tokenizer)
    assert facts(problems) == [
        ("wrong counts", TAR, KEYS[17], 1),
        ("broken conversation", TAR, KEYS[18], 1),
        ("wrong counts", TAR, KEYS[20], 1),
        ("wrong counts", TAR, KEYS[30], 1),
    ]
    tokens = int(ShardIndex.read(copy / NPZ).num_tokens[1])
    assert problems[0].found.startswith(f"{tokens - 1} tokens, ")
    assert problems[0].expected.startswith(f"{tokens} tokens, ")
    assert problems[1].found == "1 <image> tags but 2 images"


def test_a_broken_folder_or_file_does_not_hide_the_next(copy, shards, tmp_path):
    make_a_folder_of(TAR)(copy)
    (copy / "shard-000002.tar").unlink()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / INDEX_NAME).write_text(json.dumps({"version": 2}))
    (tmp_path / "empty").mkdir()
    broken = [tmp_path / name for name in ("old", "empty", "nowhere")]
    problems = problems_of(*broken, copy)
    assert [(each.cause, each.folder, each.file) for each in problems] == [
        *(("broken index", str(path), INDEX_NAME) for path in broken),
        ("unreadable file", str(copy), TAR),
        ("missing file", str(copy), "shard-000002.tar"),
    ]


def test_another_tokenizer_is_one_problem_and_its_counts_are_not_compared(copy, tokenizer):
    replace(FolderIndex.read(copy), tokenizer="0123").write(copy)
    (problem,) = problems_of(copy, tokenizer=tokenizer)
    assert problem.cause == "other tokenizer"
    assert tokenizer.fingerprint in problem.found
    assert "0123" in problem.expected


def test_samples_too_large_for_a_pack_are_named(shards):
    folder = ShardFolder.open(shards)
    lengths = folder.num_tokens + 15 * folder.num_tiles
    capacity, max_tiles = int(np.sort(lengths)[-3]), int(folder.num_tiles.max()) - 1
    for limits, too_large in (
        (PackLimits(capacity=capacity, max_tiles=10_000), lengths > capacity),
        (PackLimits(capacity=10_000, max_tiles=max_tiles), folder.num_tiles > max_tiles),
    ):
        problems = problems_of(shards, limits=limits, tokens_kept=16)
        expected = [("too large for a pack", KEYS[n]) for n in np.flatnonzero(too_large)]
        assert [(each.cause, each.samples) for each in problems] == expected != []


@pytest.mark.parametrize("workers", [0, 2])
def test_keys_that_come_again_are_named_over_all_folders(shards, copy, workers):
    problems = problems_of(shards, copy, num_workers=workers)
    assert facts(problems) == [
        ("duplicate key", f"shard-00000{n}.tar", f"{KEYS[start]} .. {KEYS[end]}", end + 1 - start)
        for n, (start, end) in enumerate([(0, 15), (16, 31), (32, 41)])
    ]
    assert {problem.folder for problem in problems} == {str(copy)}
    assert problems[2].found == f"also in {shards / 'shard-000002.tar'}"


def test_a_problem_is_one_line():
    where = {"folder": "/d", "file": "s.tar", "samples": "k", "num_samples": 1}
    problem = Problem(cause="unreadable sample", found="a\nb", expected="c", **where)
    assert str(problem) == "/d/s.tar: sample k: unreadable sample: a b; expected c"
