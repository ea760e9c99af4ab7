"""A sample's own tiling cap, and JPEG augmentation: when it happens, and that it is a function of
the seed alone."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from megatron_vico.data.encode.sample_encoder import SampleEncoder
from megatron_vico.data.encode.tiling import jpeg_degrade
from megatron_vico.data.samples import ConversationSample, Turn
from megatron_vico.vico.compression_plan import generator
from tests.toy_data import noise_png
from tests.unit.conftest import SETTINGS


def sample(*sizes, **fields):
    images = tuple(noise_png(*size, seed=seed) for seed, size in enumerate(sizes))
    return ConversationSample(
        key="k", turns=(Turn("human", "What?"), Turn("gpt", "red")), images=images, **fields
    )


@pytest.fixture
def encoder(tokenizer):
    return SampleEncoder(tokenizer=tokenizer, settings=SETTINGS)


@pytest.mark.parametrize(
    ("limit", "num_images", "tiles"),
    [
        (None, 1, 5),  # the run's cap is 4: 2 x 2 tiles and a thumbnail
        (None, 2, 1),  # of 2 tiles none is closer to a square than one alone
        *((None, 5, 1), (9, 1, 10), (9, 2, 5), (9, 9, 1), (1, 1, 1), (1, 3, 1)),
    ],
)
def test_the_cap_of_the_sample_counts_and_its_images_share_it(encoder, limit, num_images, tiles):
    capped = sample(*[(96, 96)] * num_images, max_dynamic_patch=limit)
    assert encoder.encode(capped).tiles_per_image == (tiles,) * num_images
    asked = dataclasses.replace(capped, turns=capped.turns[:1])
    (prompt,) = encoder.encode_prompt(asked)
    assert prompt.tiles_per_image == (tiles,) * num_images


def test_tiles_are_degraded_one_by_one_with_a_quality_of_their_own():
    tiles = np.random.default_rng(0).integers(0, 256, (150, 3, 16, 16), dtype=np.uint8)
    before = tiles.copy()
    degraded = jpeg_degrade(tiles, random=generator(1, 2, 3, "augment"))
    np.testing.assert_array_equal(tiles, before)
    qualities = set()
    for tile, found in zip(tiles, degraded, strict=True):
        matches = [q for q in range(70, 101) if np.array_equal(compressed(tile, q), found)]
        assert len(matches) == 1
        qualities |= set(matches)
    assert qualities == set(range(75, 101))


def compressed(tile, quality):
    file = io.BytesIO()
    Image.fromarray(tile.transpose(1, 2, 0)).save(file, format="JPEG", quality=quality)
    return np.asarray(Image.open(file)).transpose(2, 0, 1)


def test_only_training_degrades_where_the_data_set_says_so_by_seed_visit_and_sample(encoder):
    def trained(each, *which):
        return encoder.encode(each, random=generator(*which, "augment"))

    augmented, plain = sample((64, 64), data_augment=True), sample((64, 64))
    clean = encoder.encode(plain)
    np.testing.assert_array_equal(encoder.encode(augmented).tiles, clean.tiles)
    np.testing.assert_array_equal(trained(plain, 1, 0, 0).tiles, clean.tiles)
    degraded = trained(augmented, 1, 0, 0)
    assert degraded.tiles.shape == clean.tiles.shape
    np.testing.assert_array_equal(degraded.token_ids, clean.token_ids)
    assert trained(sample(data_augment=True), 1, 0, 0).num_tiles == 0
    # Another seed, visit or sample draws other bytes.
    numbers = ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))
    drawn = [trained(augmented, *which).tiles.tobytes() for which in numbers]
    assert drawn[0] == degraded.tiles.tobytes()
    assert len({clean.tiles.tobytes(), *drawn}) == 5
