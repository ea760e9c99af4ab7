"""Images to tiles by InternVL's official dynamic-resolution algorithm (`dynamic_preprocess`).

An image is resized to the grid of square tiles whose shape is closest to its own, and cut row by
row; if that gives more than one tile, the whole image at the size of one tile (the thumbnail)
follows.
"""

import io
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from megatron_vico.data.encode.image_file import open_image, to_rgb
from megatron_vico.data.samples import ByteArray
from megatron_vico.errors import SampleError


@lru_cache(maxsize=64)
def grids(max_dynamic_patch: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) with at most `max_dynamic_patch` tiles, in the official order.

    The official code sorts a set by the number of tiles alone, so that grids of equal size keep the
    set's own order. For tuples of integers that order depends only on how the set was filled; it is
    filled in the same way here.
    """
    shapes = {
        (columns, rows)
        for n in range(1, max_dynamic_patch + 1)
        for columns in range(1, n + 1)
        for rows in range(1, n + 1)
        if columns * rows <= max_dynamic_patch
    }
    return tuple(sorted(shapes, key=lambda shape: shape[0] * shape[1]))


@lru_cache(maxsize=4096)
def choose_grid(
    width: int, height: int, *, image_size: int, max_dynamic_patch: int
) -> tuple[int, int]:
    """(columns, rows) for an image of `width` x `height` px and square tiles of `image_size` px.

    The closest aspect ratio wins; of several at the same distance (1x1, 2x2, 3x3) the largest whose
    area is less than twice the image's, so that small pictures are not blown up.
    """
    aspect_ratio = width / height
    best, best_difference = (1, 1), float("inf")
    for columns, rows in grids(max_dynamic_patch):
        difference = abs(aspect_ratio - columns / rows)
        if difference < best_difference:
            best, best_difference = (columns, rows), difference
        elif (
            difference == best_difference
            and width * height > 0.5 * image_size * image_size * columns * rows
        ):
            best = (columns, rows)
    return best


def tile(
    image: Image.Image, *, image_size: int, max_dynamic_patch: int, use_thumbnail: bool
) -> ByteArray:
    """Cut an RGB image into tiles, [N, 3, S, S] uint8, row by row.

    With `use_thumbnail` the whole image, resized to one tile, follows if there are several.
    """
    columns, rows = choose_grid(
        *image.size, image_size=image_size, max_dynamic_patch=max_dynamic_patch
    )
    num_tiles = columns * rows
    with_thumbnail = num_tiles + (use_thumbnail and num_tiles > 1)
    tiles = np.empty((with_thumbnail, 3, image_size, image_size), dtype=np.uint8)
    grid = _pixels(image, image_size * columns, image_size * rows)
    grid = grid.reshape(rows, image_size, columns, image_size, 3).transpose(0, 2, 4, 1, 3)
    tiles[:num_tiles] = grid.reshape(num_tiles, 3, image_size, image_size)
    if with_thumbnail > num_tiles:
        tiles[-1] = _pixels(image, image_size, image_size).transpose(2, 0, 1)
    return tiles


def blank_tiles(
    image: Image.Image, *, image_size: int, max_dynamic_patch: int, use_thumbnail: bool
) -> ByteArray:
    """As many tiles as `tile` gives, for counting: nothing is resized, all share one number."""
    columns, rows = choose_grid(
        *image.size, image_size=image_size, max_dynamic_patch=max_dynamic_patch
    )
    num_tiles = columns * rows + (use_thumbnail and columns * rows > 1)
    return np.broadcast_to(np.uint8(0), (num_tiles, 3, image_size, image_size))


def decode_image(encoded: bytes, *, key: str, number: int) -> Image.Image:
    """Decode image `number` of sample `key` to 8-bit RGB; alpha and EXIF rotation are dropped.

    SampleError if the file is truncated, broken, no image, or above Pillow's 179 megapixels.
    """
    try:
        with open_image(encoded) as image:
            return to_rgb(image)
    # Broken bytes end in whatever their decoder meets (AVIF: RuntimeError).
    except Exception as error:
        raise SampleError(
            f"sample {key!r}: image {number} ({len(encoded)} bytes) cannot be decoded: {error}; "
            "replace the file or remove the sample.",
            cause="broken image",
        ) from error


def jpeg_degrade(tiles: ByteArray, *, random: torch.Generator) -> ByteArray:
    """Tiles [N, 3, S, S] after JPEG compression, each of a quality drawn uniformly from 75 to 100.

    As in the official code a tile is compressed after it was cut out. The frames of a video are
    compressed there before they are resized to a tile; here they are tiles like any other.
    """
    qualities = torch.randint(75, 101, (len(tiles),), generator=random)
    degraded = np.empty_like(tiles)
    for number, quality in enumerate(qualities.tolist()):
        file = io.BytesIO()
        Image.fromarray(tiles[number].transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
        with Image.open(file) as image:
            degraded[number] = np.asarray(image).transpose(2, 0, 1)
    return degraded


def _pixels(image: Image.Image, width: int, height: int) -> ByteArray:
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)
