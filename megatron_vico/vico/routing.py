"""From ViR's logits (Eq. 4 of the ViCO paper) to a plan: the paper's rule and the Flash models'.

Shape suffixes: N tiles.
"""

import torch
from torch import Tensor

COMPRESS = 0
"""Index of "compress" in ViR's two-way head: p^0 of Eq. 4, and the first output of released Flash
checkpoints."""

FLASH_RELATIVE_THRESHOLD = 0.0
"""Default quantile of the flash rule: nearest to the paper's. That of the released models is not
published."""

FLASH_ABSOLUTE_THRESHOLD = 0.5
"""Default floor of the flash rule: the paper's."""


def compress_probability(logits_N2: Tensor) -> Tensor:
    """p^0 of Eq. 4, [N] float32: how sure ViR is that a tile may be compressed."""
    return logits_N2.float().softmax(dim=-1)[:, COMPRESS]


def paper_rule(logits_N2: Tensor) -> Tensor:
    """Compress where p^0 > 0.5 (section 4.5 of the paper), [N]; no tile depends on another."""
    return compress_probability(logits_N2) > 0.5


def flash_rule(
    logits_N2: Tensor, *, relative_threshold: float, absolute_threshold: float
) -> Tensor:
    """The rule of released Flash models: above a quantile of the conversation, and above a floor.

    The comparison with the quantile is strict, so the tile that is itself the quantile, and hence
    the only tile of a single-tile image, is never compressed; that is a property of the released
    models.

    Args:
        logits_N2: [N, 2], ViR's outputs for all tiles of one conversation.
        relative_threshold: quantile in [0, 1] (`flash_relative_threshold` of config.json).
        absolute_threshold: least probability in [0, 1] (`flash_absolute_threshold`).

    Returns:
        [N] bool, True where the tile is compressed.
    """
    probability_N = compress_probability(logits_N2)
    if not len(probability_N):
        return torch.zeros(0, dtype=torch.bool)
    quantile = torch.quantile(probability_N, relative_threshold)
    return (probability_N > quantile) & (probability_N >= absolute_threshold)
