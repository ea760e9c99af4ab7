"""Tiles against cutting the resized image with PIL; broken image files."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image, features

from megatron_vico.data.encode.tiling import (
    choose_grid,
    count_tiles,
    decode_image,
    tile,
    tile_images,
    tiles_of_image,
)
from megatron_vico.errors import SampleError


def noise(width, height, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


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
    assert len(tiles) == count_tiles(
        *size, image_size=32, max_dynamic_patch=6, use_thumbnail=use_thumbnail
    )


def test_without_dynamic_resolution_there_is_one_tile():
    assert tile(noise(300, 40), image_size=32, max_dynamic_patch=1, use_thumbnail=True).shape == (
        1,
        3,
        32,
        32,
    )


@pytest.mark.parametrize(
    ("num_images", "most"), [(0, 12), (1, 12), (2, 6), (5, 2), (12, 1), (40, 1)]
)
def test_images_of_a_sample_share_the_tiles(num_images, most):
    assert tiles_of_image(12, num_images=num_images) == most


def test_two_images_get_half_the_tiles_each():
    files = [encoded(noise(64, 64), "PNG")] * 2
    shapes = [
        tiles.shape[0]
        for tiles in tile_images(
            files, key="k", image_size=32, max_dynamic_patch=4, use_thumbnail=0
        )
    ]
    assert shapes == [1, 1]
    assert (
        len(
            tile_images(
                files[:1], key="k", image_size=32, max_dynamic_patch=4, use_thumbnail=False
            )[0]
        )
        == 4
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_images_of_any_mode_become_rgb(mode):
    decoded = decode_image(
        encoded(Image.new("L", (32, 16), 7).convert(mode), "PNG"), key="k", number=0
    )
    assert (decoded.mode, decoded.size) == ("RGB", (32, 16))


def test_palettes_cmyk_and_animations_become_rgb():
    red, blue = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    clear = red.quantize(4)
    for image, kind, options in (
        (red.convert("CMYK"), "JPEG", {}),
        (clear, "PNG", {"transparency": bytes([0, 128, 255, 255])}),
        (clear, "GIF", {"save_all": True, "append_images": [blue], "transparency": 0}),
        (red, "WEBP", {"lossless": True}),
        (red, "TIFF", {}),
    ):
        written = io.BytesIO()
        image.save(written, kind, **options)
        decoded = decode_image(written.getvalue(), key="k", number=0)
        assert decoded.mode == "RGB"
        assert (
            np.abs(np.asarray(decoded).astype(int) - (255, 0, 0)).max() < 4
        )  # of an animation the first picture


def test_transparency_is_dropped_and_exif_rotation_ignored():
    hidden = Image.new("RGBA", (32, 32), (10, 20, 30, 0))
    assert decode_image(encoded(hidden, "PNG"), key="k", number=0).getpixel((0, 0)) == (10, 20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    written = io.BytesIO()
    noise(64, 32).save(written, "JPEG", exif=exif)
    assert decode_image(written.getvalue(), key="k", number=0).size == (64, 32)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 5)])
def test_thin_and_tiny_images_have_tiles(size):
    (tiles,) = tile_images(
        [encoded(noise(*size), "PNG")],
        key="k",
        image_size=32,
        max_dynamic_patch=6,
        use_thumbnail=True,
    )
    assert len(tiles) == count_tiles(*size, image_size=32, max_dynamic_patch=6, use_thumbnail=True)
    assert (len(tiles) == 7) == (max(size) == 3000)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_anywhere_is_refused(progressive):
    written = io.BytesIO()
    noise(24, 24).save(written, "JPEG", progressive=progressive)
    whole = written.getvalue()
    for size in range(len(whole)):
        with pytest.raises(SampleError, match="cannot be decoded"):
            decode_image(whole[:size], key="k", number=0)


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", *["AVIF"] * features.check("avif")]
)
def test_damaged_files_give_an_image_or_a_sample_error(kind):
    whole, random = encoded(noise(24, 24), kind), np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(whole)
        for place in random.integers(0, min(200, len(whole)), 3):
            damaged[place] = random.integers(256)
        with contextlib.suppress(SampleError):
            assert decode_image(bytes(damaged), key="k", number=0).mode == "RGB"


def test_decompression_bombs_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    with pytest.raises(SampleError, match="decompression bomb"):
        decode_image(encoded(noise(64, 64), "PNG"), key="k", number=0)


def test_broken_image_files_are_refused_by_name():
    whole = encoded(noise(64, 64), "JPEG")
    for content in (whole[: len(whole) // 2], whole[:10], b"", b"not an image"):
        with pytest.raises(
            SampleError, match=f"sample 'k': image 3 .{len(content)} bytes. cannot be decoded"
        ):
            decode_image(content, key="k", number=3)
    cut_png = encoded(noise(64, 64), "PNG")[:2000]
    with pytest.raises(SampleError, match="cannot be decoded"):
        decode_image(cut_png, key="k", number=0)
