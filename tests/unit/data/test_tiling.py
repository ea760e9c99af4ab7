"""Tiles against cutting the resized image with PIL; broken image files."""

import io

import numpy as np
import pytest
from PIL import Image

from megatron_vico.data.tiling import choose_grid, count_tiles, decode_image, tile, tile_images, tiles_of_image
from megatron_vico.errors import SampleError


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image, kind):
    written = io.BytesIO()
    image.save(written, kind)
    return written.getvalue()


@pytest.mark.parametrize("size", [(64, 64), (100, 37), (33, 200), (31, 32), (500, 300)])
@pytest.mark.parametrize("use_thumbnail", [True, False])
def test_tiles_equal_crops_of_the_resized_image(size, use_thumbnail):
    image = noise(*size)
    columns, rows = choose_grid(*size, image_size=32, max_dynamic_patch=6)
    resized = image.resize((32 * columns, 32 * rows), Image.Resampling.BICUBIC)
    crops = [
        resized.crop((32 * column, 32 * row, 32 * column + 32, 32 * row + 32))
        for row in range(rows)
        for column in range(columns)
    ]
    if use_thumbnail and len(crops) > 1:
        crops.append(image.resize((32, 32), Image.Resampling.BICUBIC))
    expected = np.stack([np.asarray(crop).transpose(2, 0, 1) for crop in crops])
    tiles = tile(image, image_size=32, max_dynamic_patch=6, use_thumbnail=use_thumbnail)
    np.testing.assert_array_equal(tiles, expected)
    assert len(tiles) == count_tiles(*size, image_size=32, max_dynamic_patch=6, use_thumbnail=use_thumbnail)


def test_without_dynamic_resolution_there_is_one_tile():
    assert tile(noise(300, 40), image_size=32, max_dynamic_patch=1, use_thumbnail=True).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(("num_images", "most"), [(0, 12), (1, 12), (2, 6), (5, 2), (12, 1), (40, 1)])
def test_images_of_a_sample_share_the_tiles(num_images, most):
    assert tiles_of_image(12, num_images=num_images) == most


def test_two_images_get_half_the_tiles_each():
    files = [encoded(noise(64, 64), "PNG")] * 2
    shapes = [
        tiles.shape[0] for tiles in tile_images(files, key="k", image_size=32, max_dynamic_patch=4, use_thumbnail=0)
    ]
    assert shapes == [1, 1]
    assert len(tile_images(files[:1], key="k", image_size=32, max_dynamic_patch=4, use_thumbnail=False)[0]) == 4


def test_grey_palette_and_transparent_images_become_rgb():
    grey = Image.new("L", (32, 32), 7)
    for image in (grey, grey.convert("P"), grey.convert("RGBA"), grey.convert("1")):
        assert decode_image(encoded(image, "PNG"), key="k", number=0).mode == "RGB"


def test_broken_image_files_are_refused_by_name():
    whole = encoded(noise(64, 64), "JPEG")
    for content in (whole[: len(whole) // 2], whole[:10], b"", b"not an image"):
        with pytest.raises(SampleError, match=f"sample 'k': image 3 .{len(content)} bytes. cannot be decoded"):
            decode_image(content, key="k", number=3)
    cut_png = encoded(noise(64, 64), "PNG")[:2000]
    with pytest.raises(SampleError, match="cannot be decoded"):
        decode_image(cut_png, key="k", number=0)
