"""JPEG augmentation of tiles, as the official training does for data sets with `data_augment`."""

import io

import numpy as np
import torch
from PIL import Image

from megatron_vico.data.samples import ByteArray

QUALITIES = (75, 100)


def jpeg_degrade(tiles: ByteArray, *, random: torch.Generator) -> ByteArray:
    """Tiles after JPEG compression, each of a quality drawn uniformly from 75 to 100.

    As in the official code a tile is compressed after it was cut out. The frames of a video are
    compressed there before they are resized to a tile; here they are tiles like any other.

    Args:
        tiles: [N, 3, S, S] uint8 RGB, which stay as they are.
        random: the sample's random stream; one number a tile.
    """
    lowest, highest = QUALITIES
    qualities = torch.randint(lowest, highest + 1, (len(tiles),), generator=random)
    degraded = np.empty_like(tiles)
    for number, quality in enumerate(qualities.tolist()):
        file = io.BytesIO()
        Image.fromarray(tiles[number].transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
        with Image.open(file) as image:
            degraded[number] = np.asarray(image).transpose(2, 0, 1)
    return degraded
