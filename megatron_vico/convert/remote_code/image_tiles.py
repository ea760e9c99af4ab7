"""An image to the normalised tiles that InternVL3.5 sees: the official dynamic-resolution
algorithm.

The image is resized to the grid of square tiles whose shape is closest to its own, and cut row by
row; if that gives more than one tile, the whole image at the size of one tile (the thumbnail)
follows. Pillow is needed for this only. From megatron_vico, Apache-2.0.
"""

import io
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_image(
    image: Any,
    *,
    image_size: int = 448,
    min_num: int = 1,
    max_num: int = 12,
    use_thumbnail: bool = True,
) -> Tensor:
    """Tiles of one image.

    Args:
        image: path of a file, or a PIL image. Decoded as in training: transparency is dropped, and
            rotation by EXIF is left to Pillow, which ignores it but in TIFF files.
        image_size: side S of a tile, in px.
        min_num: fewest tiles.
        max_num: most tiles, thumbnail not counted.
        use_thumbnail: append the whole image, resized to one tile, if it was cut into several.

    Returns:
        [N, 3, S, S] float32, ImageNet-normalised.
    """
    from PIL import Image

    if isinstance(image, str | os.PathLike):
        # From memory, as training reads it: Pillow turns TIFF files by their EXIF tag, but not when
        # it maps a file.
        with Image.open(io.BytesIO(Path(image).read_bytes())) as opened:
            image = opened.convert("RGB")
    image = image.convert("RGB")
    columns, rows = choose_grid(
        *image.size, image_size=image_size, min_num=min_num, max_num=max_num
    )
    grid = _pixels(image, columns * image_size, rows * image_size)
    # [rows, S, columns, S, 3] to [rows, columns, 3, S, S].
    grid = grid.view(rows, image_size, columns, image_size, 3).permute(0, 2, 4, 1, 3)
    tiles = [grid.reshape(rows * columns, 3, image_size, image_size)]
    if use_thumbnail and rows * columns > 1:
        tiles.append(_pixels(image, image_size, image_size).permute(2, 0, 1)[None])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return torch.cat(tiles).float().div_(255.0).sub_(mean).div_(std)


def choose_grid(
    width: int, height: int, *, image_size: int, min_num: int, max_num: int
) -> tuple[int, int]:
    """(columns, rows) for an image of `width` x `height` px.

    The closest aspect ratio wins; of several at the same distance the last one whose area is less
    than twice the image's. The official code sorts a set by the number of tiles alone, so that
    grids of equal size keep the set's own order, which depends on how it was filled: it is filled
    in the same way here.
    """
    shapes: set[tuple[int, int]] = set()
    for n in range(min_num, max_num + 1):
        for columns in range(1, n + 1):
            for rows in range(1, n + 1):
                if min_num <= columns * rows <= max_num:
                    shapes.add((columns, rows))
    best, best_difference = (1, 1), float("inf")
    for columns, rows in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        difference = abs(width / height - columns / rows)
        if difference < best_difference:
            best, best_difference = (columns, rows), difference
        elif (
            difference == best_difference
            and width * height > 0.5 * image_size * image_size * columns * rows
        ):
            best = (columns, rows)
    return best


def _pixels(image: Any, width: int, height: int) -> Tensor:
    """[height, width, 3] uint8."""
    from PIL import Image

    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
