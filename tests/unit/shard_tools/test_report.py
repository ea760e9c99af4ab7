"""Statistics against numbers worked out by hand, and samples as text."""

import json

import numpy as np
import pytest

from megatron_vico.data.encode.sample_encoder import EncodingSettings, SampleEncoder
from megatron_vico.data.encode.tokenizer import IMAGE_CONTEXT
from megatron_vico.data.pack.packing import PackLimits
from megatron_vico.data.samples import ConversationSample, Turn
from megatron_vico.data.shards.reader import ShardFolder
from megatron_vico.shard_tools import report
from megatron_vico.shard_tools.report import (
    PackingOptions,
    ShardStatistics,
    histogram,
    histogram_lines,
    spread,
)
from megatron_vico.shard_tools.sample_view import image_lines, token_text, turn_lines, view_image
from tests.unit.conftest import NUM_SAMPLES, SETTINGS


def options(*, capacity=512, max_tiles=96):
    return PackingOptions(
        limits=PackLimits(capacity=capacity, max_tiles=max_tiles), window=512, tokens_kept=16
    )


def test_a_spread_has_values_that_occur():
    numbers = spread(np.array([7, 1, 2, 9, 3]))
    percentiles = {"p5": 1, "p25": 2, "p50": 3, "p75": 7, "p95": 9, "p99": 9}
    assert numbers == {"total": 22, "mean": 4.4, "min": 1, **percentiles, "max": 9}
    assert spread(np.arange(1, 101))["p99"] == 99
    assert set(spread(np.array([], dtype=np.int64)).values()) == {0}


def test_a_histogram_ends_at_powers_of_two():
    rows = [(0, 0, 1), (1, 1, 1), (2, 2, 1), (3, 4, 2), (5, 8, 2), (9, 16, 2)]
    assert histogram(np.array([0, 1, 2, 3, 4, 5, 8, 9, 16])) == rows
    assert histogram(np.array([5, 20])) == [(5, 8, 1), (9, 16, 0), (17, 32, 1)]
    assert histogram(np.array([], dtype=np.int64)) == []
    assert histogram_lines(np.array([1, 2, 2])) == [
        f"  1  1   33.3%  {'#' * 20}",
        f"  2  2   66.7%  {'#' * 40}",
    ]


def test_samples_are_counted(shards, conversations, tokenizer):
    folder = ShardFolder.open(shards)
    found = ShardStatistics.of([folder], repeats=[1], packing=options())
    # write_conversations: one image, one image, two images, none, and so on.
    assert found.num_images.tolist() == [(1, 1, 2, 0)[number % 4] for number in range(NUM_SAMPLES)]
    content = found.as_json()
    assert content["kinds"] == {"text only": 10, "one image": 22, "several images": 10}
    encoder = SampleEncoder(tokenizer=tokenizer, settings=SETTINGS)
    encoded = [encoder.encode(folder.read(number)) for number in range(NUM_SAMPLES)]
    for name, counts in {
        "tokens, one per tile": [each.token_ids.size for each in encoded],
        "tokens, uncompressed": [each.token_ids.size + 15 * len(each.tiles) for each in encoded],
        "trained tokens": [each.labels.size for each in encoded],
        "tiles": [len(each.tiles) for each in encoded],
        "images": [len(each.tiles_per_image) for each in encoded],
    }.items():
        middle = sorted(counts)[NUM_SAMPLES // 2 - 1]
        expected = {"total": sum(counts), "min": min(counts), "max": max(counts), "p50": middle}
        assert expected.items() <= content["columns"][name].items()
    text = found.as_text()
    assert f"{sum(len(each.tiles) for each in encoded)}" in text
    assert "text only 10 (23.8%), one image 22 (52.4%), several images 10 (23.8%)" in text
    assert "full in tokens" in text
    json.dumps(content)


def test_packs_are_counted(shards):
    folder = ShardFolder.open(shards)
    lengths = folder.num_tokens + 15 * folder.num_tiles
    packing = ShardStatistics.of([folder], repeats=[1], packing=options()).packing
    assert packing.tokens.sum() == lengths.sum()
    assert packing.tiles.sum() == folder.num_tiles.sum()
    assert packing.samples.sum() == NUM_SAMPLES
    assert packing.tokens.max() <= 512
    assert packing.token_fill == pytest.approx(lengths.sum() / (512 * len(packing.tokens)))
    assert packing.tile_fill == pytest.approx(folder.num_tiles.sum() / (96 * len(packing.tokens)))
    assert packing.samples_per_pack == pytest.approx(NUM_SAMPLES / len(packing.tokens))
    few_tiles = options(capacity=10_000, max_tiles=4)
    narrow = ShardStatistics.of([folder], repeats=[1], packing=few_tiles).packing
    assert narrow.num_too_large == (folder.num_tiles > 4).sum() > 0
    assert narrow.samples.sum() == NUM_SAMPLES - narrow.num_too_large
    nothing = ShardStatistics.of([folder], repeats=[1], packing=options(capacity=1)).packing
    assert (nothing.num_too_large, nothing.token_fill, len(nothing.tokens)) == (NUM_SAMPLES, 0, 0)
    without = ShardStatistics.of([folder], repeats=[1])
    assert without.packing is None
    assert "packing" not in without.as_json()
    assert "packs" not in without.as_text()


def test_a_folder_comes_as_often_as_the_mixture_says(shards, monkeypatch):
    folder = ShardFolder.open(shards)
    found = ShardStatistics.of([folder, folder], repeats=[0.5, 2], packing=options())
    assert len(found.num_tokens) == 2 * NUM_SAMPLES  # each once in the statistics
    assert found.packing.samples.sum() == NUM_SAMPLES // 2 + 2 * NUM_SAMPLES
    assert found.packing.tokens.sum() > 2 * (folder.num_tokens + 15 * folder.num_tiles).sum()
    monkeypatch.setattr(report, "MAX_PACKED", 30)
    assert ShardStatistics.of([folder], repeats=[1], packing=options()).packing.samples.sum() == 30


def test_grids_are_those_that_were_cut(shards):
    folder = ShardFolder.open(shards)
    grids = {(64, 32): (2, 1), (96, 32): (3, 1), (32, 32): (1, 1)}
    seen = {}
    for number in range(NUM_SAMPLES):
        tiles = folder.describe(number).tiles_per_image
        if len(tiles) == 1:
            image = view_image(folder.read(number).images[0], tiles[0], SETTINGS)
            grid = (image.columns, image.rows, image.num_tiles, image.tiling)
            seen.setdefault((image.width, image.height), set()).add(grid)
    for size, (columns, rows) in grids.items():
        alone = columns * rows == 1
        tiling = "1 tile" if alone else f"{columns}x{rows}+1 tiles"
        assert seen[size] == {(columns, rows, columns * rows + (not alone), tiling)}


def test_images_of_one_kind_share_a_line(shards):
    folder = ShardFolder.open(shards)
    sample = folder.read(0)
    settings = EncodingSettings(image_size=32, max_dynamic_patch=1)
    png = sample.images[0]
    lines = image_lines([view_image(each, 1, settings) for each in (png, png, b"broken", png)])
    size = f"PNG 64x32, {len(png)} bytes, 1 tile"
    assert lines == [
        f"images 0 to 1: {size}",
        "image 2: CANNOT BE OPENED, 6 bytes, 1 tile",
        f"image 3: {size}",
    ]


def test_trained_text_is_marked(shards, tokenizer):
    sample = ShardFolder.open(shards).read(0)
    answer = sample.turns[2].text
    assert turn_lines(sample)[1:3] == ["human: <image>\nWhat colour?", f"gpt: [+{answer}+]"]
    text = token_text(sample, encoder=SampleEncoder(tokenizer=tokenizer, settings=SETTINGS))
    assert text.count(f"<|im_start|>assistant\n[+{answer}<|im_end|>+]") == 2
    assert text.count("[+") == 2
    assert f"<img>{IMAGE_CONTEXT}*3</img>" in text
    pretrain = ConversationSample(key="k", turns=(Turn("pretrain", "red and green"),))
    assert turn_lines(pretrain) == ["pretrain: [+red and green+]"]
