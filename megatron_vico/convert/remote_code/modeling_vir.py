"""ViR, the router of InternVL3.5-Flash: from the patches of a tile to two logits. For inference.

Module names are those of the released checkpoints, where these two are `pooling_before_gating` and
`gating`. Shapes: N tiles, P patches of a tile, D channels. From megatron_vico, Apache-2.0.
"""

import torch
from torch import Tensor, nn


class RouterPooling(nn.Module):
    """One vector from the patches of a tile: a learned query attends four times.

    The released forward pass uses attn2 and norm2 three times. attn3, attn4, norm3 and norm4 are in
    every checkpoint and used by nothing.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.query_token = nn.Parameter(torch.randn(1, width))
        for index in range(1, 5):
            setattr(self, f"attn{index}", nn.MultiheadAttention(width, num_heads, batch_first=True))
            setattr(self, f"norm{index}", nn.LayerNorm(width))

    def forward(self, features_NPD: Tensor) -> Tensor:
        """[N, P, D] to [N, D]."""
        out = self.query_token.expand(len(features_NPD), 1, -1)
        for index in (1, 2, 2, 2):
            attention, norm = self.get_submodule(f"attn{index}"), self.get_submodule(f"norm{index}")
            out = norm(attention(out, features_NPD, features_NPD, need_weights=False)[0])
        return out.squeeze(1)


class RouterGating(nn.Module):
    """Four residual blocks and a two-way head; output 0 is "compress"."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for index in range(1, 5):
            block = nn.Sequential(
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Dropout(0.1),
                nn.Linear(4 * width, width),
                nn.Dropout(0.1),
                nn.LayerNorm(width),
            )
            setattr(self, f"block{index}", block)
        self.gate = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, D] to [N, 2]."""
        for index in range(1, 5):
            x_ND = x_ND + self.get_submodule(f"block{index}")(x_ND)
        logits_N2: Tensor = self.gate(x_ND)
        return logits_N2
