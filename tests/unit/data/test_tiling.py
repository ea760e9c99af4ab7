"""Tiles against cutting the resized image with PIL; broken image files."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from megatron_vico.data.encode.tiling import (
    blank_tiles,
    choose_grid,
    decode_image,
    tile,
)
from megatron_vico.errors import SampleError

SIZES = [(64, 64), (100, 37), (33, 200), (31, 32), (500, 300), (1, 1), (1, 3000), (3000, 1), (2, 5)]


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, kind, **options):
    written = io.BytesIO()
    image.save(written, kind, **options)
    return written.getvalue()


def decoded(content):
    return decode_image(content, key="k", number=3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("use_thumbnail", [True, False])
@pytest.mark.parametrize("max_dynamic_patch", [1, 6])
def test_tiles_equal_crops_of_the_resized_image(size, use_thumbnail, max_dynamic_patch):
    image, limits = noise(*size), {"image_size": 32, "max_dynamic_patch": max_dynamic_patch}
    columns, rows = choose_grid(*size, **limits)
    resized = image.resize((32 * columns, 32 * rows), Image.Resampling.BICUBIC)
    crops = [
        resized.crop((32 * column, 32 * row, 32 * column + 32, 32 * row + 32))
        for row in range(rows)
        for column in range(columns)
    ]
    if use_thumbnail and len(crops) > 1:
        crops.append(image.resize((32, 32), Image.Resampling.BICUBIC))
    expected = np.stack([np.asarray(crop).transpose(2, 0, 1) for crop in crops])
    tiles = tile(image, use_thumbnail=use_thumbnail, **limits)
    np.testing.assert_array_equal(tiles, expected)
    blank = blank_tiles(image, use_thumbnail=use_thumbnail, **limits)
    assert (blank.shape, blank.dtype) == (tiles.shape, tiles.dtype)
    assert max_dynamic_patch > 1 or len(tiles) == 1


def test_images_of_any_mode_become_rgb():
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = decoded(encoded(Image.new("L", (32, 16), 7).convert(mode), "PNG"))
        assert (image.mode, image.size) == ("RGB", (32, 16)), mode
    red, blue = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "blue")
    clear = red.quantize(4)
    for image, kind, options in (
        (red.convert("CMYK"), "JPEG", {}),
        (clear, "PNG", {"transparency": bytes([0, 128, 255, 255])}),
        (clear, "GIF", {"save_all": True, "append_images": [blue], "transparency": 0}),
        (red, "WEBP", {"lossless": True}),
        (red, "TIFF", {}),
    ):
        found = decoded(encoded(image, kind, **options))
        assert found.mode == "RGB"
        # Of an animation the first picture.
        assert np.abs(np.asarray(found).astype(int) - (255, 0, 0)).max() < 4


def test_more_than_8_bits_are_scaled_or_refused_by_name():
    grey = (np.arange(64 * 8, dtype=np.uint16) * 128).reshape(8, 64)
    for kind in ("PNG", "TIFF", "PPM", "JPEG2000"):
        if kind == "JPEG2000" and not features.check("jpg_2000"):
            continue
        pixels = np.asarray(decoded(encoded(Image.fromarray(grey), kind)))
        np.testing.assert_array_equal(pixels, np.repeat((grey >> 8)[..., None], 3, -1))
    for image in (Image.new("F", (8, 8), 0.5), Image.new("I", (8, 8), 1 << 20)):
        with pytest.raises(SampleError, match=f"TIFF of mode {image.mode}, whose numbers have no"):
            decoded(encoded(image, "TIFF"))


def test_a_png_with_large_text_is_read_and_a_program_is_not_run():
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", "y" * 3_000_000, zip=True)
    assert decoded(encoded(Image.new("RGB", (8, 8)), "PNG", pnginfo=text)).size == (8, 8)
    with pytest.raises(SampleError, match="no image of JPEG, PNG"):
        decoded(encoded(Image.new("RGB", (8, 8)), "EPS"))  # Ghostscript would run it


def test_transparency_is_dropped_and_exif_rotation_ignored():
    hidden = Image.new("RGBA", (32, 32), (10, 20, 30, 0))
    assert decoded(encoded(hidden, "PNG")).getpixel((0, 0)) == (10, 20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    assert decoded(encoded(noise(64, 32), "JPEG", exif=exif)).size == (64, 32)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_anywhere_is_refused(progressive):
    whole = encoded(noise(24, 24), "JPEG", progressive=progressive)
    for size in range(len(whole)):
        with pytest.raises(SampleError, match="cannot be decoded"):
            decoded(whole[:size])


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", *["AVIF"] * features.check("avif")]
)
def test_damaged_files_give_an_image_or_a_sample_error(kind):
    whole, random = encoded(noise(24, 24), kind), np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(whole)
        for index in random.integers(0, min(200, len(whole)), 3):
            damaged[index] = random.integers(256)
        with contextlib.suppress(SampleError):
            assert decoded(bytes(damaged)).mode == "RGB"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_broken_image_files_and_decompression_bombs_are_refused_by_name(monkeypatch):
    whole, png = (encoded(noise(64, 64), kind) for kind in ("JPEG", "PNG"))
    broken = [whole[: len(whole) // 2], whole[:10], b"", b"not an image", png[:2000]]
    # PNGs that say they are this large.
    for size in ((60_000, 60_000), (2**31 - 1, 2**31 - 1), (0, 5)):
        header = png[12:16] + struct.pack(">II", *size) + png[24:29]
        broken.append(png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:])
    for content in (*broken, bytes(1000), whole[:300] + bytes(300)):
        message = rf"sample 'k': image 3 .{len(content)} bytes. cannot be decoded"
        with pytest.raises(SampleError, match=message):
            decoded(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    with pytest.raises(SampleError, match="decompression bomb"):
        decoded(png)
