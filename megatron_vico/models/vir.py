"""ViR, the Visual Resolution Router: from the patches of a tile to two logits, compress or keep.

The structure is that of the released Flash models, quirks included.
Shapes: N tiles, P patches of a tile, D channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_DEAD = ("attn3", "attn4", "norm3", "norm4")


def is_dead(name: str) -> bool:
    """Whether a parameter of ViR, by its name, is in released checkpoints and used by nothing."""
    return not set(_DEAD).isdisjoint(name.split("."))


class Pooling(nn.Module):
    """One vector from any number of patches: a learned query attends four times.

    The released forward pass uses attn2 and norm2 three times and never attn3, attn4, norm3 and
    norm4. Those are kept, frozen, so that a checkpoint goes in and out without loss.
    """

    def __init__(self, *, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.query_token = nn.Parameter(torch.randn(1, hidden_size))
        for index in range(1, 5):
            attention = nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)
            setattr(self, f"attn{index}", attention)
            setattr(self, f"norm{index}", nn.LayerNorm(hidden_size))
        for name in _DEAD:
            getattr(self, name).requires_grad_(False)

    def forward(self, features_NPD: Tensor) -> Tensor:
        """[N, P, D] to [N, D]."""
        out = self.query_token.expand(features_NPD.size(0), 1, -1)
        for index in (1, 2, 2, 2):
            attention, norm = self.get_submodule(f"attn{index}"), self.get_submodule(f"norm{index}")
            attended, _ = attention(out, features_NPD, features_NPD, need_weights=False)
            out = norm(attended)
        return out.squeeze(1)


class Gating(nn.Module):
    """Four residual blocks and a two-way head."""

    def __init__(self, *, hidden_size: int) -> None:
        super().__init__()
        for index in range(1, 5):
            block = nn.Sequential(
                nn.Linear(hidden_size, 4 * hidden_size),
                nn.GELU(),
                nn.Identity(),  # where released modules have dropout, for the names of the others
                nn.Linear(4 * hidden_size, hidden_size),
                nn.Identity(),
                nn.LayerNorm(hidden_size),
            )
            setattr(self, f"block{index}", block)
        self.gate = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, 2))

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] to [N, 2]."""
        for index in range(1, 5):
            x = x + self.get_submodule(f"block{index}")(x)
        logits: Tensor = self.gate(x)
        return logits


class ViR(nn.Module):
    """Eq. 4 of the ViCO paper up to the softmax: which tiles can be compressed.

    Dropout (0.1 in the released module) is left out for the reason given at Connector16x.
    """

    def __init__(self, *, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.pooling = Pooling(hidden_size=hidden_size, num_heads=num_heads)
        self.gating = Gating(hidden_size=hidden_size)

    def forward(self, features_NPD: Tensor, tiles_per_image: Sequence[int] | None = None) -> Tensor:
        """Logits [N, 2] of each tile, index 0 = compress, from ViT outputs [N, P, D].

        With the tiles of each image, which add up to N, the pooling runs over all patches of an
        image, and every tile of it gets the image's logits (image-level router of Table 3).
        """
        if tiles_per_image is None:
            logits: Tensor = self.gating(self.pooling(features_NPD))
            return logits
        counts = list(tiles_per_image)
        assert sum(counts) == features_NPD.size(0), (
            f"{counts} tiles an image, {features_NPD.size(0)} tiles"
        )
        images = [image for image in features_NPD.split(counts) if len(image)]
        if not images:
            return features_NPD.new_zeros(0, 2)
        pooled = torch.cat([self.pooling(image.flatten(0, 1).unsqueeze(0)) for image in images])
        of_images = self.gating(pooled).unbind()
        tiles = [row for row, image in zip(of_images, images, strict=True) for _ in image]
        return torch.stack(tiles)
