"""A run that is stopped and goes on takes the packs it would have taken; what no longer belongs to
it is refused."""

import dataclasses
import itertools
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_vico.config.schema import DataOptions
from megatron_vico.data.pack.order import EpochOrder
from megatron_vico.data.pack.packing import iter_packs
from megatron_vico.data.pack.plan import SECTION_WINDOWS, PackPlan
from megatron_vico.data.pack.plan_state import PlanState
from megatron_vico.data.shards.index import FolderIndex, IndexedSample, ShardFiles, ShardIndex
from megatron_vico.data.shards.reader import ShardFolder
from megatron_vico.errors import CheckpointError, ConfigError
from tests.unit.conftest import COST, GLOBAL_BATCH, SETTINGS

OPTIONS = DataOptions(seq_length=400, max_tiles_per_pack=20, packing_window=16, shuffle_shards=5)
REPEATS = (1.0, 0.4, 2.5)
NUM_STEPS = 1000


def folder(name, *, shards, seed):
    """A folder of which only the index exists."""
    rng = random.Random(seed)
    indexes = [
        ShardIndex.of([sample(rng, f"{name}-{s}-{i}") for i in range(size)])
        for s, size in enumerate(shards)
    ]
    files = [
        ShardFiles(
            name=f"{s}.tar",
            num_bytes=0,
            sha256=f"{seed:064x}",
            num_samples=size,
            index_sha256="0" * 64,
        )
        for s, size in enumerate(shards)
    ]
    index = FolderIndex(tokenizer="t", settings=SETTINGS, shards=tuple(files))
    return ShardFolder(Path(name), index, indexes)


def sample(rng, key):
    tiles = rng.choice([0, 0, rng.randint(1, 5), rng.randint(1, 16)])
    return IndexedSample(
        key=key,
        members=((0, 1),) * (1 + bool(tiles)),
        num_tokens=tiles + rng.randint(5, 120),
        num_responses=3,
        tiles_per_image=(tiles,) if tiles else (),
    )


@pytest.fixture(scope="module")
def folders():
    rng = random.Random(0)
    sizes = [[rng.randint(20, 60) for _ in range(count)] for count in (30, 12, 7)]
    return [
        folder(name, shards=each, seed=i)
        for i, (name, each) in enumerate(zip("abc", sizes, strict=True))
    ]


@pytest.fixture(scope="module")
def make(folders):
    """plan(**overrides) of the options, or of PackPlan's arguments."""

    def plan(**overrides):
        of_options = {field.name for field in dataclasses.fields(DataOptions)}
        given = {k: overrides.pop(k) for k in list(overrides) if k in of_options}
        defaults = {
            "repeats": REPEATS,
            "tokens_kept": 4,
            "seed": 7,
            "global_batch_size": GLOBAL_BATCH,
            "cost": COST,
        }
        of_folders = overrides.pop("folders", folders)
        options = dataclasses.replace(OPTIONS, **given)
        return PackPlan(of_folders, options=options, **(defaults | overrides))

    return plan


@pytest.fixture(scope="module")
def uninterrupted(make):
    return list(itertools.islice(make().steps(), NUM_STEPS))


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_steps_with_stops_are_those_without(make, uninterrupted, seed):
    """At random points; the state goes through JSON."""
    rng = random.Random(seed)
    state, taken = None, []
    while len(taken) < NUM_STEPS:
        count = rng.randint(1, 200)
        # Some are prefetched, and never trained on.
        asked = list(itertools.islice(make().steps(state), count + rng.randint(0, 3)))
        taken += asked[: min(count, NUM_STEPS - len(taken))]
        state = PlanState.from_dict(json.loads(json.dumps(taken[-1].after.to_dict())))
    assert [(step.packs, step.costs) for step in taken] == [
        (step.packs, step.costs) for step in uninterrupted
    ]
    assert state == uninterrupted[-1].after
    assert len(json.dumps(state.to_dict())) < 400  # measured 334
    assert state.epoch >= 3
    assert max(step.after.section for step in uninterrupted) >= 2


@pytest.mark.parametrize("name", ["pack", "section", "epoch"])
def test_a_state_one_off_would_be_noticed(make, uninterrupted, name):
    state = uninterrupted[500].after
    assert next(make().steps(state)).packs == uninterrupted[501].packs
    off = dataclasses.replace(state, **{name: getattr(state, name) + 1})
    assert next(make().steps(off)).packs != uninterrupted[501].packs


def test_another_global_batch_size_goes_on_with_the_next_pack(make, uninterrupted):
    packs = [pack for step in uninterrupted for pack in step.packs]
    state, taken = None, []
    for size in itertools.cycle([1, 6, 4, 9]):
        for step in itertools.islice(make(global_batch_size=size).steps(state), 7):
            state = step.after
            taken += step.packs
            assert state.consumed_packs == len(taken)
        if len(taken) >= len(packs):
            break
    assert taken[: len(packs)] == packs


def test_each_visit_of_a_sample_comes_once(make, uninterrupted, folders):
    last = uninterrupted[-1].after.epoch
    visits = Counter(
        v
        for step in uninterrupted
        for p in step.packs
        for v in zip(p.sample_ids, p.visits, strict=True)
    )
    assert max(visits.values()) == 1
    sizes = np.cumsum([len(each) for each in folders])
    of_whole_epochs = [(i, visit) for i, visit in visits if i < sizes[0] and visit < last]
    # The folder with repeat 1: the visit is the epoch.
    assert len(of_whole_epochs) == sizes[0] * last
    third = Counter(i for i, visit in visits if i >= sizes[1] and visit < 3)
    assert set(third.values()) == {2, 3}
    assert set(third) == set(range(sizes[1], sizes[2]))


def test_packs_of_a_small_data_set_are_packed_as_a_whole(make, folders):
    """Naively: the whole order, packed at once. Golden losses depend on it."""
    few = folders[2:]
    plan = make(folders=few, repeats=None, shuffle_shards=64, packing_window=8)
    assert plan.num_samples <= SECTION_WINDOWS * 8
    order = EpochOrder([few[0].samples_per_shard], repeats=(1.0,), seed=7, epoch=1, block_shards=64)
    ids = order.slice(0, plan.num_samples)[0]
    lengths, tiles = plan.lengths[ids].tolist(), plan.num_tiles[ids].tolist()
    naive = [
        tuple(ids[list(p)].tolist())
        for p in iter_packs(lengths, tiles=tiles, limits=plan.limits, window=8)
    ]
    epochs = [list(plan.epoch(epoch)) for epoch in range(3)]
    assert [pack.sample_ids for pack in epochs[1]] == naive
    assert epochs[1][0].visits == (1,) * len(naive[0])
    for packs in epochs:
        ids = sorted(i for pack in packs for i in pack.sample_ids)
        assert ids == list(range(plan.num_samples))
    assert epochs[0] != epochs[1] != epochs[2]
    whole = list(itertools.chain(*epochs))
    steps = itertools.islice(plan.steps(), len(whole) // GLOBAL_BATCH)
    packs = [pack for step in steps for pack in step.packs]
    assert packs == whole[: len(packs)]


def test_finding_the_place_packs_one_section(make, uninterrupted, monkeypatch):
    """Not all that came before, which takes minutes after months."""
    packed = []

    def counting(lengths, **arguments):
        packed.append(len(lengths))
        return iter_packs(lengths, **arguments)

    monkeypatch.setattr("megatron_vico.data.pack.plan.iter_packs", counting)
    state = uninterrupted[-10].after
    assert state.epoch >= 3
    assert next(make().steps(state)).packs == uninterrupted[-9].packs
    assert packed == [SECTION_WINDOWS * OPTIONS.packing_window]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_length": 300}, "--seq-length was 400, now 300"),
        ({"max_tiles_per_pack": 30}, "--max-tiles-per-pack was 20, now 30"),
        ({"max_samples_per_pack": 3}, "--max-samples-per-pack was None, now 3"),
        ({"packing_window": 8}, "--packing-window was 16, now 8"),
        ({"shuffle_shards": 6}, "--shuffle-shards was 5, now 6"),
        ({"seed": 8}, "--seed was 7, now 8"),
        ({"tokens_kept": 3}, "tokens per tile was 4, now 3"),
        ({"repeats": (1.0, 0.5, 2.5)}, "b came 0.4 times an epoch, now 0.5"),
    ],
)
def test_other_packs_are_refused_and_what_differs_is_named(make, uninterrupted, change, message):
    state = uninterrupted[10].after
    with pytest.raises(ConfigError, match=f"belongs to other packs: {message}. Undo"):
        make(**change).steps(state)
    forced = next(make(**change, override_data_state=True).steps(state))
    assert forced.after.consumed_packs == 12 * GLOBAL_BATCH


def test_changed_shards_and_another_packer_are_refused(make, uninterrupted, folders):
    state = uninterrupted[10].after
    other = folder("b", shards=folders[1].samples_per_shard, seed=99)
    with pytest.raises(ConfigError, match=r"other packs: the shards of b changed. Undo"):
        make(folders=[folders[0], other, folders[2]]).steps(state)
    with pytest.raises(ConfigError, match="--data-path had 3 folders, now 2"):
        make(folders=folders[:2], repeats=REPEATS[:2]).steps(state)
    moved = folder("elsewhere", shards=folders[1].samples_per_shard, seed=1)
    going_on = make(folders=[folders[0], moved, folders[2]]).steps(state)
    assert next(going_on).packs == uninterrupted[11].packs
    older = dataclasses.replace(state, inputs=dataclasses.replace(state.inputs, packer_version=0))
    with pytest.raises(ConfigError, match="the version of packing was 0, now 1"):
        make().steps(older)


def test_an_overridden_state_beyond_its_section_goes_on_with_the_next(make, uninterrupted, folders):
    state = next(step.after for step in uninterrupted if step.after.section == 2)
    few = make(folders=folders[2:], repeats=(1.0,), override_data_state=True)
    assert next(few.steps(state)).packs == tuple(
        itertools.islice(few.epoch(state.epoch + 1), GLOBAL_BATCH)
    )


@pytest.mark.parametrize(
    "content", [{"consumed_steps": 3}, {}, {"inputs": {"folders": [], "repeats": []}}]
)
def test_a_state_of_something_else_is_refused(content):
    with pytest.raises(CheckpointError, match=r"state of the data .*not what this version writes"):
        PlanState.from_dict(content)


def test_no_sample_is_refused(make, folders):
    with pytest.raises(ConfigError, match=r"no samples \(0.0\d+ an epoch\)"):
        make(folders=folders[2:], repeats=(0.0001,))
