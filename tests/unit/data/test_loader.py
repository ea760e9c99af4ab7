"""Batches against a naive assembly; the same packs for any number of ranks."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch

from megatron_vico.data.encode.expand import expand
from megatron_vico.data.encode.sample_encoder import SampleEncoder
from megatron_vico.data.load.loader import Loader
from megatron_vico.data.pack.balance import EQUAL_COST, Sharing, share
from megatron_vico.data.pack.plan import Pack, PackPlan
from megatron_vico.data.shards.reader import ShardFolder
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.vico import compression_plan
from tests.toy_data import write_conversations
from tests.unit.conftest import (
    BUILDER,
    COST,
    SETTINGS,
    flat,
    joined_packs,
    step_plan,
    take,
)

COUNTS = {"tokens_kept": 4, "tokens_compressed": 1, "image_token_id": 5}


@pytest.fixture
def encoder(tokenizer):
    return SampleEncoder(tokenizer=tokenizer, settings=SETTINGS)


def naive_plans(sampler, samples, pack):
    """The plan of each sample, from the streams that belong to it or to its pack."""
    if sampler == "stratified":
        images = [count for sample in samples for count in sample.tiles_per_image]
        stream = compression_plan.generator(7, pack.visits[0], pack.sample_ids[0], "xi-of-pack")
        whole = compression_plan.plan_stratified(images, generator=stream)
        return torch.split(whole, [sample.num_tiles for sample in samples])
    streams = [compression_plan.generator(7, pack.visits[0], i, "xi") for i in pack.sample_ids]
    return [
        compression_plan.plan_fraction(sample.tiles_per_image, generator=stream, sampler=sampler)
        for stream, sample in zip(streams, samples, strict=True)
    ]


@pytest.fixture(scope="module")
def augmented_shards(make, tmp_path_factory):
    """Shards of a data set with `data_augment`."""
    source = write_conversations(
        tmp_path_factory.mktemp("augmented"), num_samples=12, images_per_sample=(1, 2)
    )
    rows = [{**json.loads(line), "data_augment": True} for line in source.read_text().splitlines()]
    source.write_text("\n".join(map(json.dumps, rows)))
    make(source, source.parent / "shards")
    return source.parent / "shards"


@pytest.mark.parametrize("sampler", ["stratified", "bernoulli", "exact-count"])
def test_batch_equals_its_samples_one_by_one(load, shards, encoder, sampler):
    folder, loader = ShardFolder.open(shards), load(xi_sampler=sampler)
    for step, batches in enumerate(take(loader, 6)):  # some samples come for the second time
        plan = step_plan(loader.plan, step)
        total = sum(float(batch.kl_weight.double().sum()) for batch in batches)
        assert total == pytest.approx(1.0, abs=1e-6)  # measured 3e-8
        for pack, batch in zip(plan.packs, batches, strict=True):
            samples = [encoder.encode(folder.read(i)) for i in pack.sample_ids]
            drawn = naive_plans(sampler, samples, pack)
            assert batch.keys == tuple(sample.key for sample in samples)
            assert batch.tiles_per_image == sum((sample.tiles_per_image for sample in samples), ())
            assert batch.tiles_per_sample == tuple(len(sample.tiles) for sample in samples)
            tiles = np.concatenate([sample.tiles for sample in samples])
            np.testing.assert_array_equal(batch.tiles, tiles)
            assert batch.labels.tolist() == [label for sample in samples for label in sample.labels]
            weights = [
                1 / (len(sample.labels) * plan.num_samples)
                for sample in samples
                for _ in sample.labels
            ]
            # float32 rounding: 6e-8
            np.testing.assert_allclose(batch.kl_weight, weights, rtol=1e-7)
            (policy,) = batch.policies
            assert policy.compressed.tolist() == torch.cat(drawn).tolist()
            check_stream(batch.reference, samples, [torch.zeros_like(each) for each in drawn])
            check_stream(policy, samples, drawn)
            for stream in (batch.reference, policy):
                rows = stream.response_rows
                assert stream.token_ids[rows + 1].tolist() == batch.labels.tolist()
                assert (rows >= stream.cu_seqlens[batch.sample_of_row]).all()
                assert (rows < stream.cu_seqlens[batch.sample_of_row + 1] - 1).all()


def check_stream(stream, samples, plans):
    parts = [
        expand([sample], plan=plan, **COUNTS) for sample, plan in zip(samples, plans, strict=True)
    ]
    assert stream.token_ids.tolist() == torch.cat([part.token_ids for part in parts]).tolist()
    ends = np.cumsum([0] + [len(part.token_ids) for part in parts]).tolist()
    assert stream.cu_seqlens.tolist() == ends
    visual = (stream.token_ids == 5).nonzero().squeeze(1)
    assert stream.visual_positions.tolist() == visual.tolist()


@pytest.mark.parametrize(
    ("stage", "cost", "dp_size", "sharing"),
    [
        ("pretrain", EQUAL_COST, 2, Sharing()),
        ("router", EQUAL_COST, 4, Sharing()),
        ("router", COST, 2, Sharing()),
        ("consistency", COST, 2, Sharing()),
        ("consistency", COST, 4, Sharing()),
        ("consistency", COST, 2, Sharing(counts="equal")),
        ("consistency", COST, 4, Sharing(in_step=2)),
        ("consistency", COST, 4, Sharing(in_step=2, counts="equal")),
    ],
)
def test_ranks_share_the_packs_of_a_step_by_cost(load, stage, cost, dp_size, sharing):
    """Each rank has what `share` gives it; together they have the packs, though some are cut."""
    loader = load(stage=stage, cost=cost)
    alone = take(loader, 8)
    ranks = [
        take(load(stage=stage, cost=cost, dp_rank=rank, dp_size=dp_size, sharing=sharing), 8)
        for rank in range(dp_size)
    ]
    cut = 0
    for step, whole in enumerate(alone):
        plan = step_plan(loader.plan, step)
        for pack, found in zip(plan.packs, plan.costs, strict=True):
            lengths, tiles = (
                [int(each[i]) for i in pack.sample_ids]
                for each in (loader.plan.lengths, loader.plan.num_tiles)
            )
            assert found == tuple(
                cost.flops(length, tiles=count)
                for length, count in zip(lengths, tiles, strict=True)
            )
        parts = share(plan.costs, num_ranks=dp_size, sharing=sharing)
        starts = list(itertools.accumulate((len(each) for each in plan.costs), initial=0))
        for rank, of_rank in zip(ranks, parts, strict=True):
            assert [(pack.position, pack.first_sample, len(pack.keys)) for pack in rank[step]] == [
                (part.pack, starts[part.pack] + part.first, part.stop - part.first)
                for part in of_rank
            ]
        packs = list(itertools.chain.from_iterable(rank[step] for rank in ranks))
        assert joined_packs(packs) == joined_packs(whole)
        cut += len(packs) > len(whole)
    assert (cut > 0) == (cost is COST and sharing.counts == "any")


@pytest.mark.parametrize("granularity", ["tile", "image"])
def test_the_routers_question(load, granularity):
    chosen = set()
    for batches in take(load(stage="router", router_granularity=granularity), 10):
        for batch in batches:
            none, asked = batch.policies
            assert not none.compressed.any()
            assert none.token_ids.tolist() == batch.reference.token_ids.tolist()
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


def test_a_pack_without_images(shards, encoder):
    folder = ShardFolder.open(shards)
    text_only = [int(i) for i in np.flatnonzero(folder.num_tiles == 0)[:2]]
    samples = [encoder.encode(folder.read(i)) for i in text_only]
    for stage in ("pretrain", "consistency", "router"):
        builder = dataclasses.replace(BUILDER, stage=stage)
        pack = Pack(sample_ids=tuple(text_only), visits=(0,) * len(text_only))
        batch = builder.build(samples, pack=pack, samples_in_global_batch=2)
        assert (batch.policies == ()) == (stage == "pretrain")
        assert batch.num_tiles == 0
        assert batch.router_tiles.dtype == batch.router_tile_sample.dtype == torch.int64
        assert all(view.compressed.shape == (0,) for view in batch.policies)


def test_a_sample_larger_than_a_pack_is_named(load):
    with pytest.raises(
        SampleError, match=r"'conversations-\d+' of .* but a pack holds 60 and 20 .*--seq-length"
    ):
        load(seq_length=60)
    with pytest.raises(SampleError, match=r"\d tiles, but a pack holds 400 and 3"):
        load(max_tiles_per_pack=3)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"dp_size": 3}, "--global-batch-size 4 is not a multiple of the 3"),
        ({"max_dynamic_patch": 2}, "indexed with EncodingSettings"),
        ({"data_path": ()}, "no samples"),
    ],
)
def test_options_that_do_not_fit_are_refused(load, option, message):
    with pytest.raises(ConfigError, match=message):
        load(**option)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_differs_from_its_index_is_refused(options, shards, encoder, num_workers):
    folder = ShardFolder.open(shards)
    folder.num_tokens[:] += 1
    options = dataclasses.replace(options, num_workers=num_workers)
    plan = PackPlan([folder], options=options, tokens_kept=4, seed=7, global_batch_size=1)
    loader = Loader(plan, encoder=encoder, builder=BUILDER)
    with pytest.raises(SampleError, match=r"tokens and \d tiles, but the index"):
        take(loader, 1)


def test_augmentation_belongs_to_seed_visit_and_sample(load, augmented_shards, encoder):
    """Whatever rank and worker encodes a sample, its tiles are those of its own stream; each visit
    has others."""
    folder = ShardFolder.open(augmented_shards)
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
