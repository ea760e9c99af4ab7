"""Batches against a naive assembly; the same packs for any number of ranks."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import torch

from megatron_vico.data.encode.expand import expand
from megatron_vico.data.encode.sample_encoder import SampleEncoder
from megatron_vico.data.load.loader import Loader
from megatron_vico.data.pack.balance import assign
from megatron_vico.data.pack.plan import Pack, PackPlan
from megatron_vico.data.shards.reader import ShardFolder
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.shard_tools.options import WriterOptions
from megatron_vico.shard_tools.writer import make_shards
from megatron_vico.vico import compression_plan
from tests.toy_data import write_conversations
from tests.unit.conftest import (
    BUILDER,
    COST,
    GLOBAL_BATCH,
    NUM_SAMPLES,
    SETTINGS,
    flat,
    flat_steps,
    step_plan,
    take,
)

COUNTS = {"tokens_kept": 4, "tokens_compressed": 1, "image_token_id": 5}


def naive_plans(sampler, samples, pack):
    """The plan of each sample, from the streams that belong to it or to its pack."""
    if sampler == "stratified":
        images = [count for sample in samples for count in sample.tiles_per_image]
        stream = compression_plan.generator(7, pack.visits[0], pack.sample_ids[0], "xi-of-pack")
        whole = compression_plan.plan_stratified(images, generator=stream)
        return torch.split(whole, [sample.num_tiles for sample in samples])
    return [
        compression_plan.plan_fraction(
            sample.tiles_per_image,
            generator=compression_plan.generator(7, pack.visits[0], i, "xi"),
            sampler=sampler,
        )
        for i, sample in zip(pack.sample_ids, samples, strict=True)
    ]


@pytest.fixture(scope="module")
def augmented_shards(tokenizer, tmp_path_factory):
    """Shards of a data set with `data_augment`."""
    source = write_conversations(
        tmp_path_factory.mktemp("augmented"), num_samples=12, images_per_sample=(1, 2)
    )
    rows = [{**json.loads(line), "data_augment": True} for line in source.read_text().splitlines()]
    source.write_text("\n".join(map(json.dumps, rows)))
    out = source.parent / "shards"
    make_shards(
        source,
        image_root=source.parent,
        out_dir=out,
        tokenizer=tokenizer,
        settings=SETTINGS,
        options=WriterOptions(show_progress=False),
    )
    return out


@pytest.mark.parametrize("sampler", ["stratified", "bernoulli", "exact-count"])
def test_batch_equals_its_samples_one_by_one(load, shards, tokenizer, sampler):
    folder, encoder = (
        ShardFolder.open(shards),
        SampleEncoder(tokenizer=tokenizer, settings=SETTINGS),
    )
    loader = load(xi_sampler=sampler)
    for step, batches in enumerate(take(loader, 3)):
        plan = step_plan(loader.plan, step)
        for pack, batch in zip(plan.packs, batches, strict=True):
            samples = [encoder.encode(folder.read(i)) for i in pack.sample_ids]
            drawn = naive_plans(sampler, samples, pack)
            assert batch.keys == tuple(sample.key for sample in samples)
            assert batch.tiles_per_image == sum((sample.tiles_per_image for sample in samples), ())
            assert batch.tiles_per_sample == tuple(len(sample.tiles) for sample in samples)
            np.testing.assert_array_equal(
                batch.tiles, np.concatenate([sample.tiles for sample in samples])
            )
            assert batch.labels.tolist() == [label for sample in samples for label in sample.labels]
            expected_weights = [
                1 / (len(sample.labels) * plan.num_samples)
                for sample in samples
                for _ in sample.labels
            ]
            np.testing.assert_allclose(
                batch.kl_weight, expected_weights, rtol=1e-7
            )  # float32 rounding: 6e-8
            (policy,) = batch.policies
            assert policy.compressed.tolist() == torch.cat(drawn).tolist()
            for stream, plans in (
                (batch.reference, [torch.zeros_like(each) for each in drawn]),
                (policy.stream, drawn),
            ):
                parts = [
                    expand([sample], plan=each, **COUNTS)
                    for sample, each in zip(samples, plans, strict=True)
                ]
                assert stream.token_ids.tolist() == [
                    token for part in parts for token in part.token_ids
                ]
                assert stream.token_ids[stream.response_rows + 1].tolist() == batch.labels.tolist()
                assert len(stream.visual_positions) == int((stream.token_ids == 5).sum())
                assert (
                    stream.cu_seqlens.tolist()
                    == np.cumsum([0] + [len(part.token_ids) for part in parts]).tolist()
                )
            starts = batch.reference.cu_seqlens[batch.sample_of_row.long()]
            ends = batch.reference.cu_seqlens[batch.sample_of_row.long() + 1]
            assert bool(
                (
                    (batch.reference.response_rows >= starts)
                    & (batch.reference.response_rows < ends - 1)
                ).all()
            )


def test_weights_of_a_global_batch_sum_to_one(load):
    for batches in take(load(), 6):
        total = sum(float(batch.kl_weight.double().sum()) for batch in batches)
        assert total == pytest.approx(1.0, abs=1e-6)  # measured 3e-8
    ranks = [take(load(dp_rank=rank, dp_size=2), 1)[0] for rank in range(2)]
    assert sum(float(batch.kl_weight.sum()) for rank in ranks for batch in rank) == pytest.approx(
        1.0, abs=1e-6
    )


def test_each_epoch_has_every_sample_once_and_another_order(load):
    plan = load().plan
    epochs = [[i for pack in plan.epoch(epoch) for i in pack.sample_ids] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(NUM_SAMPLES))
    assert epochs[0] != epochs[1] != epochs[2]
    packs = [pack for step in itertools.islice(plan.steps(), 12) for pack in step.packs]
    expected = [pack for epoch in range(4) for pack in plan.epoch(epoch)]
    assert packs == expected[: len(packs)]
    assert {pack.visits[0] for pack in packs} >= {0, 1, 2}


def test_each_epoch_draws_new_plans(load):
    seen = {}
    for batch in itertools.chain.from_iterable(take(load(), 20)):
        plans = torch.split(batch.policies[0].compressed, batch.tiles_per_sample)
        for key, plan in zip(batch.keys, plans, strict=True):
            if len(plan) >= 3:
                seen.setdefault(key, []).append(tuple(plan.tolist()))
    assert all(len(plans) >= 4 for plans in seen.values())
    assert sum(len(set(plans)) > 1 for plans in seen.values()) > len(seen) / 2


@pytest.mark.parametrize("stage", ["pretrain", "consistency", "router"])
def test_two_ranks_together_have_the_batches_of_one(load, stage):
    """Packs that cost the same are dealt one after the other."""
    alone = flat_steps(take(load(stage=stage), 8))
    first, second = (
        flat_steps(take(load(stage=stage, dp_rank=rank, dp_size=2), 8)) for rank in range(2)
    )
    for whole, even, odd in zip(alone, first, second, strict=True):
        assert [even[0], odd[0], even[1], odd[1]] == whole


@pytest.mark.parametrize("dp_size", [2, 4])
def test_ranks_share_the_packs_of_a_step_by_cost(load, dp_size):
    loader = load(cost=COST)
    alone = flat_steps(take(loader, 8))
    ranks = [
        flat_steps(take(load(cost=COST, dp_rank=rank, dp_size=dp_size), 8))
        for rank in range(dp_size)
    ]
    moved = 0
    for step, whole in enumerate(alone):
        plan = step_plan(loader.plan, step)
        costs = [naive_cost(loader.plan, pack) for pack in plan.packs]
        np.testing.assert_allclose(plan.costs, costs, rtol=1e-12)  # measured 0
        assignment = assign(plan.costs, num_ranks=dp_size)
        for rank, numbers in zip(ranks, assignment, strict=True):
            assert rank[step] == [whole[number] for number in numbers]
        assert sorted(batch for rank in ranks for batch in rank[step]) == sorted(whole)
        moved += assignment != tuple(
            tuple(range(rank, GLOBAL_BATCH, dp_size)) for rank in range(dp_size)
        )
    assert moved > 0 or dp_size == GLOBAL_BATCH  # one pack a rank has nothing to balance


def naive_cost(plan, pack):
    cost = 0.0
    for i in pack.sample_ids:
        full = int(plan.lengths[i])
        compressed = full - 1.5 * int(plan.num_tiles[i])
        cost += 20.0 * full + 0.5 * full**2 + 3 * (20.0 * compressed + 0.5 * compressed**2)
        cost += 300.0 * int(plan.num_tiles[i])
    return cost


def test_another_number_of_ranks_goes_on_with_the_same_batches(load):
    """One rank takes three steps, four take the next three: each step has the packs that it has
    without a change."""
    one = load(cost=COST)
    whole = flat_steps(take(one, 3))
    state = json.loads(json.dumps(one.state_dict()))
    whole += flat_steps(take(one, 3))
    ranks = [
        flat_steps(take(load(cost=COST, dp_rank=rank, dp_size=4, state=state), 3))
        for rank in range(4)
    ]
    for step in range(3):
        assert sorted(batch for rank in ranks for batch in rank[step]) == sorted(whole[3 + step])


def test_a_packs_shares_depend_on_nothing_but_the_pack(load, shards, tokenizer):
    """Samples without images in between draw nothing; another epoch or pack draws anew."""
    folder, encoder = (
        ShardFolder.open(shards),
        SampleEncoder(tokenizer=tokenizer, settings=SETTINGS),
    )
    text = int(np.flatnonzero(folder.num_tiles == 0)[0])
    images = [int(i) for i in np.flatnonzero(folder.num_tiles >= 3)[:3]]

    def plan(ids, epoch=0):
        samples = [encoder.encode(folder.read(i)) for i in ids]
        pack = Pack(sample_ids=tuple(ids), visits=(epoch,) * len(ids))
        return (
            BUILDER.build(samples, pack=pack, samples_in_global_batch=4)
            .policies[0]
            .compressed.tolist()
        )

    alone = plan(images)
    assert plan(images) == alone
    assert plan([images[0], text, images[1], text, images[2]]) == alone
    assert plan(images, epoch=1) != alone
    assert plan(images[::-1]) != alone


def test_pretrain_has_no_policy_stream(load):
    assert all(batch.policies == () for batch in take(load(stage="pretrain"), 1)[0])


@pytest.mark.parametrize("granularity", ["tile", "image"])
def test_the_routers_question(load, granularity):
    chosen = set()
    for batches in take(load(stage="router", router_granularity=granularity), 10):
        for batch in batches:
            none, asked = batch.policies
            assert not none.compressed.any()
            assert none.stream.token_ids.tolist() == batch.reference.token_ids.tolist()
            assert torch.nonzero(asked.compressed).flatten().tolist() == batch.router_tiles.tolist()
            sample_of_tile = torch.repeat_interleave(
                torch.arange(len(batch.keys)), torch.tensor(batch.tiles_per_sample)
            )
            assert batch.router_tile_sample.tolist() == sample_of_tile[batch.router_tiles].tolist()
            # Each sample with images is asked about one tile or one image; one without is left out.
            for local, count in enumerate(batch.tiles_per_sample):
                tiles = batch.router_tiles[batch.router_tile_sample == local].tolist()
                start = sum(batch.tiles_per_sample[:local])
                if granularity == "tile":
                    assert len(tiles) == min(count, 1)
                    chosen.update((count, tile - start) for tile in tiles)
                elif count:
                    ends = np.cumsum((0, *batch.tiles_per_image)).tolist()
                    assert any(tiles == list(range(a, b)) for a, b in itertools.pairwise(ends))
                else:
                    assert not tiles
    if granularity == "tile":
        assert {tile for count, tile in chosen if count == 5} == {0, 1, 2, 3, 4}


def test_a_pack_without_images(load, shards, tokenizer):
    folder, encoder = (
        ShardFolder.open(shards),
        SampleEncoder(tokenizer=tokenizer, settings=SETTINGS),
    )
    text_only = [int(i) for i in np.flatnonzero(folder.num_tiles == 0)[:2]]
    samples = [encoder.encode(folder.read(i)) for i in text_only]
    for stage in ("pretrain", "consistency", "router"):
        builder = dataclasses.replace(BUILDER, stage=stage)
        pack = Pack(sample_ids=tuple(text_only), visits=(0,) * len(text_only))
        batch = builder.build(samples, pack=pack, samples_in_global_batch=2)
        assert batch.num_tiles == 0
        assert batch.router_tiles.dtype == batch.router_tile_sample.dtype == torch.int64
        assert all(view.compressed.shape == (0,) for view in batch.policies)


def test_two_folders_are_one_data_set(load, shards, tmp_path):
    plan = load(data_path=(str(shards), str(shutil.copytree(shards, tmp_path / "copy")))).plan
    assert plan.num_samples == 2 * NUM_SAMPLES
    folder, number = plan.data.locate(NUM_SAMPLES + 3)
    assert folder is plan.data.folders[1]
    assert number == 3


def test_a_sample_larger_than_a_pack_is_named(load):
    with pytest.raises(
        SampleError, match=r"'conversations-\d+' of .* but a pack holds 60 and 20 .*--seq-length"
    ):
        load(seq_length=60)
    with pytest.raises(SampleError, match=r"\d tiles, but a pack holds 400 and 3"):
        load(max_tiles_per_pack=3)


def test_options_that_do_not_fit_are_refused(load, options, shards, tokenizer):
    with pytest.raises(ConfigError, match="--global-batch-size 4 is not a multiple of the 3"):
        load(dp_size=3)
    with pytest.raises(ConfigError, match="indexed with EncodingSettings"):
        load(max_dynamic_patch=2)
    with pytest.raises(ConfigError, match="<IMG_CONTEXT> is 5, but the model expects 151671"):
        load(image_token_id=151671)
    with pytest.raises(ConfigError, match="no samples"):
        load(data_path=())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_differs_from_its_index_is_refused(options, shards, tokenizer, num_workers):
    folder = ShardFolder.open(shards)
    folder.num_tokens[:] += 1
    options = dataclasses.replace(options, num_workers=num_workers)
    plan = PackPlan([folder], options=options, tokens_kept=4, seed=7, global_batch_size=1)
    loader = Loader(
        plan, encoder=SampleEncoder(tokenizer=tokenizer, settings=SETTINGS), builder=BUILDER
    )
    with pytest.raises(SampleError, match=r"tokens and \d tiles, but the index"):
        take(loader, 1)


def test_augmentation_belongs_to_seed_visit_and_sample(load, augmented_shards, tokenizer):
    """Whatever rank and worker encodes a sample, its tiles are those of its own stream; each visit
    has others."""
    folder, encoder = (
        ShardFolder.open(augmented_shards),
        SampleEncoder(tokenizer=tokenizer, settings=SETTINGS),
    )
    options, steps = {"data_path": (str(augmented_shards),), "global_batch_size": 2}, 6
    alone = load(**options)
    batches = take(alone, steps)
    ranks = [
        take(load(**options, num_workers=2, dp_rank=rank, dp_size=2), steps) for rank in range(2)
    ]
    seen = {}
    for step, of_step in enumerate(batches):
        found = {batch.position: flat(batch) for rank in ranks for batch in rank[step]}
        assert found == {batch.position: flat(batch) for batch in of_step}
        for batch in of_step:
            pack = step_plan(alone.plan, step).packs[batch.position]
            tiles = torch.split(batch.tiles, batch.tiles_per_sample)
            for sample_id, visit, of_sample in zip(
                pack.sample_ids, pack.visits, tiles, strict=True
            ):
                random = compression_plan.generator(7, visit, sample_id, "augment")
                np.testing.assert_array_equal(
                    of_sample, encoder.encode(folder.read(sample_id), random=random).tiles
                )
                seen.setdefault(sample_id, []).append(of_sample.numpy().tobytes())
    often = [tiles for tiles in seen.values() if len(tiles) > 1]
    assert sum(tiles[0] != tiles[1] for tiles in often) > len(often) / 2 > 0
