"""Overlays: compressed tiles are shaded and no others, whole images keep their pixels."""

import numpy as np
import pytest
from PIL import Image

from megatron_vico.evaluation import overlays


def make_routed(compressed, *, columns=2, scores=None, title=""):
    rows = len(compressed) // columns
    picture = Image.new("RGB", (4 * columns, 4 * rows), (200, 0, 0))
    scores = scores or [0.9 if each else 0.1 for each in compressed]
    return overlays.RoutedImage(
        picture=picture, columns=columns, compressed=compressed, probability=scores, title=title
    )


def test_compressed_tiles_are_shaded_and_kept_tiles_untouched():
    plan = [True, False, False, True]
    pixels = np.asarray(
        overlays.routing_picture([make_routed(plan)], tokens=(256, 64), tile_px=100, columns=1)
    )
    pitch, margin = 102, 12
    for index, compressed in enumerate(plan):
        # Clear of the label, which is half way down the left edge.
        y, x = margin + index // 2 * pitch + 80, margin + index % 2 * pitch + 50
        red, green, blue = (int(v) for v in pixels[y, x])
        if compressed:
            assert (red, green, blue) == pytest.approx((128 * 0.62 + 200 * 0.38, 79, 79), abs=1.5)
        else:
            assert (red, green, blue) == (200, 0, 0)


def test_labels_differ_with_the_score():
    def label(score):
        image = make_routed([False], columns=1, scores=[score])
        return np.asarray(overlays.routing_picture([image], tokens=(256, 64), tile_px=100))[
            50:80, :60
        ]

    assert not np.array_equal(label(0.12), label(0.87))
    with pytest.raises(ValueError, match="zip"):  # one score for two tiles
        overlays.routing_picture([make_routed([True, False], scores=[0.5])], tokens=(256, 64))


def test_several_images_of_different_shapes_fit():
    shapes = ((4, 2), (6, 3), (1, 1))
    images = [make_routed([True] * count, columns=columns) for count, columns in shapes]
    picture = overlays.routing_picture(images, tokens=(256, 64), tile_px=50, columns=2)
    assert picture.width == 12 + 2 * (3 * 52 - 2 + 12)
    assert picture.height > 2 * (2 * 52 - 2 + 12)


def test_a_whole_image_keeps_its_pixels_and_its_shape():
    noise = np.random.default_rng(0).integers(0, 256, (360, 800, 3), dtype=np.uint8)
    image = overlays.RoutedImage(
        picture=Image.fromarray(noise),
        columns=4,
        compressed=[index == 5 for index in range(12)],
        probability=[0.5] * 12,
        title="noise",
    )
    picture = overlays.routing_picture([image], tokens=(256, 64))
    assert picture.width == 12 + 4 * 202 - 2 + 12
    pixels = np.asarray(picture)
    line = picture.height - (12 + 3 * 122 - 2 + 12)  # the title, and as high the caption
    top = 12 + line // 2 + 122  # second row
    for column in range(4):
        shown = pixels[top + 80 : top + 120, 12 + column * 202 : 12 + column * 202 + 200]
        own = noise[120 + 80 : 240, column * 200 : column * 200 + 200]
        assert np.array_equal(shown, own) == (column != 1)
    assert (pixels[12 : 12 + line // 2, 12:200] < 128).any()  # the title
    assert not (
        np.asarray(overlays.routing_picture([make_routed([False] * 2)], tokens=(256, 64)))[:12]
        < 128
    ).any()
