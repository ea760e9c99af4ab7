"""From patch features to visual tokens: pixel shuffle, and a connector for either kind of tile.

Shapes: N tiles, P patches of a tile, Q visual tokens of a tile, D channels of the ViT, H of the
language model.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn


def pixel_shuffle(features_NPD: Tensor, ratio: int) -> Tensor:
    """Fold each ratio x ratio square of patches into one vector.

    The released models' pixel shuffle "v2": [N, P, D] with P patches of a square tile, row by row,
    to [N, P / ratio^2, ratio^2 * D], squares row by row, and in each its patches row by row.
    """
    num_tiles, num_patches, width = features_NPD.shape
    side = math.isqrt(num_patches)
    squares = features_NPD.view(num_tiles, side // ratio, ratio, side // ratio, ratio, width)
    folded = squares.permute(0, 1, 3, 2, 4, 5)
    return folded.reshape(num_tiles, num_patches // ratio**2, ratio**2 * width)


class Connector4x(nn.Module):
    """Visual tokens of a kept tile: one for each 2x2 patches (256 of 1024)."""

    def __init__(self, *, vision_size: int, language_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * vision_size)
        self.linear_1 = nn.Linear(4 * vision_size, language_size)
        self.linear_2 = nn.Linear(language_size, language_size)

    def forward(self, features_NPD: Tensor) -> Tensor:
        """[N, P, D] to [N, P / 4, H]."""
        x = self.linear_1(self.norm(pixel_shuffle(features_NPD, 2)))
        tokens: Tensor = self.linear_2(F.gelu(x))
        return tokens


class Connector16x(nn.Module):
    """Visual tokens of a compressed tile: one for each 4x4 patches (64 of 1024).

    The released module has dropout 0.1 after each GELU. Here is none: dropout is not a function of
    (seed, epoch, sample), so that results would depend on layout and restart, and the paper's
    target is a KL of 0.
    """

    def __init__(self, *, vision_size: int, language_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16 * vision_size)
        self.linear_1 = nn.Linear(16 * vision_size, 2 * language_size)
        self.linear_2 = nn.Linear(2 * language_size, 2 * language_size)
        self.linear_3 = nn.Linear(2 * language_size, language_size)

    def forward(self, features_NPD: Tensor) -> Tensor:
        """[N, P, D] to [N, P / 16, H]."""
        x = F.gelu(self.linear_1(self.norm(pixel_shuffle(features_NPD, 4))))
        tokens: Tensor = self.linear_3(F.gelu(self.linear_2(x)))
        return tokens
