"""Broken samples: what stays as it is around them, how they are counted, and what a resumed run
knows of them."""

import dataclasses
import itertools
import json
import pickle

import pytest
import torch

from megatron_vico.data.load.error_budget import MIN_SAMPLES, ErrorBudget, SkipList
from megatron_vico.data.samples import Skipped
from megatron_vico.data.shards.reader import ShardFolder
from megatron_vico.errors import SampleError
from tests.toy_data import break_image
from tests.unit.conftest import take

STEPS = 7
"""About three epochs of the 42 samples."""


@pytest.fixture(scope="module")
def victim(shards):
    """A sample with two images of several tiles, in the middle."""
    folder = ShardFolder.open(shards)
    images = [len(folder.describe(i).tiles_per_image) for i in range(len(folder))]
    wide = [i for i in range(len(folder)) if images[i] == 2 and folder.num_tiles[i] > 2]
    return wide[len(wide) // 2]


@pytest.fixture
def broken(copy, victim):
    break_image(copy, victim)
    return copy


@pytest.fixture
def key(shards, victim):
    return ShardFolder.open(shards).describe(victim).key


def by_sample(batch):
    """All that belongs to each sample of a batch, by its name."""
    found = {}
    counts = list(batch.tiles_per_sample)
    for local, key in enumerate(batch.keys):
        tiles = slice(sum(counts[:local]), sum(counts[: local + 1]))
        rows = batch.sample_of_row == local
        of_sample = [key, batch.tiles[tiles].tolist(), batch.labels[rows].tolist()]
        of_sample += [
            batch.kl_weight[rows].tolist(),
            int((batch.router_tile_sample == local).sum()),
        ]
        for stream in (batch.reference, *batch.policies):
            start, end = stream.cu_seqlens[local : local + 2].tolist()
            ids = stream.token_ids[start:end].tolist()
            rows_here = (stream.response_rows[rows] - start).tolist()
            of_sample.append([ids, rows_here, stream.compressed[tiles].tolist()])
        found[key] = of_sample
    return found


@pytest.mark.parametrize(
    ("num_workers", "of_builder"),
    [
        (0, {}),
        (1, {"xi_sampler": "bernoulli"}),
        (1, {"stage": "router"}),
        (0, {"stage": "router", "router_granularity": "image"}),
    ],
    ids=str,
)
def test_a_broken_image_changes_nothing_of_the_other_samples(
    load, broken, victim, key, of_builder, num_workers
):
    whole = take(load(**of_builder), STEPS)
    gapped = take(load(data_path=(str(broken),), num_workers=num_workers, **of_builder), STEPS)
    seen = 0
    for batch, other in zip(itertools.chain(*gapped), itertools.chain(*whole), strict=True):
        found, expected = by_sample(batch), by_sample(other)
        assert list(found) == list(expected)
        assert found.pop(key, None) == gap_of(expected.pop(key, None))
        assert found == expected
        seen += key in batch.keys
        assert torch.isfinite(batch.kl_weight).all()
        assert len(batch.reference.cu_seqlens) == len(batch.keys) + 1
    assert seen >= 2  # it comes again, and counts once
    skipped = [each for batches in gapped for batch in batches for each in batch.skipped]
    assert [(each.sample_id, each.cause) for each in skipped] == [(victim, "broken image")]
    assert f"sample '{skipped[0].key}': image 0" in skipped[0].reason


def gap_of(sample):
    """What is left of a sample: its key, and one token that is not trained."""
    if sample is None:
        return None
    key, _, _, _, _, *streams = sample
    return [key, [], [], [], 0, *([[0], [], []] for _ in streams)]


def test_a_pack_of_nothing_but_gaps(load, copy):
    for tar in copy.glob("*.tar"):
        tar.write_bytes(b"\0" * tar.stat().st_size)
    for batch in take(load(data_path=(str(copy),)), 1)[0]:
        assert len(batch.labels) == len(batch.tiles) == 0
        assert batch.tiles.shape[1:] == (3, 32, 32)
        assert batch.reference.token_ids.tolist() == [0] * len(batch.keys)
        assert {each.cause for each in batch.skipped} == {"unreadable shard"}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_leaves_out_what_has_become_readable(load, broken, victim, key, num_workers):
    """A disk that was away for a while: the run that was never interrupted had skipped the sample
    for good."""
    loader = load(data_path=(str(broken),))
    take(loader, 4)
    assert [each.sample_id for each in loader.skips] == [victim]
    loader.skips = SkipList.merged([loader.skips], from_pack=loader.begun_packs)
    state = json.loads(json.dumps(loader.state_dict()))
    going_on = take(loader, 3)
    resumed = load(num_workers=num_workers, state=state)
    resumed_packs = itertools.chain(*take(resumed, 3))
    left_out = 0
    for batch, other in zip(resumed_packs, itertools.chain(*going_on), strict=True):
        assert by_sample(batch) == by_sample(other)
        assert batch.skipped == other.skipped == ()
        left_out += key in batch.keys
    assert left_out == 1
    assert list(resumed.skips) == [dataclasses.replace(each, reason="") for each in loader.skips]
    forgetful = take(load(state=state | {"skipped": []}), 3)
    batches = zip(itertools.chain(*forgetful), itertools.chain(*going_on), strict=True)
    assert any(by_sample(batch) != by_sample(other) for batch, other in batches)


def test_what_is_left_out_begins_where_no_rank_has_begun():
    found = Skipped(sample_id=3, key="a", cause="bad text")
    other = Skipped(sample_id=5, key="b", cause="bad text", from_pack=8)
    new = dataclasses.replace(other, from_pack=None)
    lists = [SkipList([found]), SkipList([new]), SkipList([other, found])]
    merged = SkipList.merged(lists, from_pack=20)
    assert [(each.sample_id, each.from_pack) for each in merged] == [(3, 20), (5, 8)]
    assert not merged.leaves_out(3, pack=19)
    assert merged.leaves_out(3, pack=20)
    assert not merged.leaves_out(4, pack=20)
    # Its finder reads it again, as all others do, until all know.
    assert not lists[0].leaves_out(3, pack=99)
    state = merged.to_state()
    assert SkipList.from_state(json.loads(json.dumps(state))).to_state() == state


def test_samples_that_are_elsewhere_now_are_forgotten(load, victim, key):
    state = load().state_dict()
    listed = [[number, key, "bad text", 0] for number in (victim, victim + 1, 10**6)]
    assert [each.sample_id for each in load(state=state | {"skipped": listed}).skips] == [victim]


@pytest.mark.parametrize(
    ("max_share", "seen", "skipped", "exceeded"),
    [
        (0.001, 100, 10, False),
        (0.001, 100, 11, True),
        (0.001, MIN_SAMPLES + 1000, 11, False),
        (0.0, 0, 0, False),
        (0.0, 0, 1, True),
    ],
)
def test_the_budget_is_a_share_of_what_was_seen_and_of_many_from_the_start(
    max_share, seen, skipped, exceeded
):
    assert ErrorBudget(max_share=max_share, seen=seen, skipped=skipped).exceeded == exceeded


def test_the_table_names_causes_and_first_keys():
    text = Skipped(sample_id=9, key="text/9", cause="bad text")
    images = [Skipped(sample_id=i, key=f"image/{i}", cause="broken image") for i in range(5)]
    skips = SkipList([*images, text])
    assert len(skips) == 6
    assert not skips.add(dataclasses.replace(text))
    text = str(ErrorBudget(max_share=0.0, seen=50, skipped=6).error(skips))
    assert text.startswith("6 broken samples among 50 seen, more than --max-skipped-share 0.0")
    assert text.splitlines()[2:] == [
        "       5  broken image      'image/0', 'image/1', 'image/2', ...",
        "       1  bad text          'text/9'",
    ]


def test_causes_travel_from_a_worker():
    error = pickle.loads(pickle.dumps(SampleError("what is wrong", cause="unreadable shard")))
    assert (str(error), error.cause) == ("what is wrong", "unreadable shard")
    assert SampleError("x").cause == "bad text"
