"""Eq. 2-3 of the ViCO paper: how much worse an answer gets with one tile compressed, and the label.

Shape suffixes: M questions asked of the router (one tile, or one image, of each sample), W window,
R response rows.
"""

import torch
from torch import Tensor


def sample_means(values_R: Tensor, sample_of_row_R: Tensor, num_samples: int) -> Tensor:
    """Mean over each sample's response rows: L_ViCO of one sample (Eq. 1 without its expectation).

    Args:
        values_R: [R] float32, KL of each response row.
        sample_of_row_R: [R] int64, which sample a row belongs to, in [0, num_samples).
        num_samples: of the batch.

    Returns:
        [num_samples] float32; 0 for a sample without rows.
    """
    total = values_R.new_zeros(num_samples).index_add_(0, sample_of_row_R, values_R)
    rows = values_R.new_zeros(num_samples).index_add_(0, sample_of_row_R, torch.ones_like(values_R))
    return total / rows.clamp_min(1)


def loss_ratio(kl_compressed_M: Tensor, kl_uncompressed_M: Tensor, *, eps: float) -> Tensor:
    """r of Eq. 2: consistency loss with the tile at 64 tokens over the loss with it at 256.

    Args:
        kl_compressed_M: [M] float32, nats, one tile of the sample compressed.
        kl_uncompressed_M: [M] float32, nats, nothing compressed. 0 where policy and reference are
            equal: hence eps.
        eps: added to both, nats; the paper names none.

    Returns:
        [M] float32, > 0.
    """
    return (kl_compressed_M + eps) / (kl_uncompressed_M + eps)


def labels_from_ratios(ratio_M: Tensor, threshold: Tensor) -> Tensor:
    """Eq. 3: class 0 (compress) where r < tau, class 1 (keep) where r >= tau. Returns [M] int64."""
    return (ratio_M >= threshold).long()


class RatioWindow:
    """The sliding window of past loss ratios whose k-th percentile is the threshold tau of Eq. 3.

    Every data-parallel rank pushes the same ratios in the same order (they are gathered first), so
    every rank finds the same threshold.
    """

    def __init__(self, *, size: int, percentile: float) -> None:
        """An empty window of `size` ratios (unpublished); k in [0, 100], 60 in the paper."""
        self.size = size
        self.percentile = percentile
        self._ratios_W = torch.empty(0)

    def push(self, ratio_M: Tensor) -> None:
        """Add new ratios, [M] float32; the oldest leave when the window is full."""
        self._ratios_W = torch.cat([self._ratios_W, ratio_M.detach().float().cpu()])[-self.size :]

    def threshold(self) -> Tensor:
        """tau of Eq. 3: the percentile of the ratios in the window, a float32 scalar.

        NaN while the window is empty, as after a first step without any image: it has no question
        to label either.
        """
        return self.percentiles(self.percentile)[0]

    def percentiles(self, *percents: float) -> Tensor:
        """Percentiles of the ratios in the window, float32; NaN while it is empty."""
        if not len(self._ratios_W):
            return torch.full((len(percents),), float("nan"))
        return torch.quantile(self._ratios_W, torch.tensor([each / 100 for each in percents]))

    def state(self) -> Tensor:
        """What a checkpoint keeps: the ratios, oldest first, [W] float32."""
        return self._ratios_W.clone()

    def load(self, ratios_W: Tensor) -> None:
        """Take up the `state` of a checkpoint; the newest ratios stay if the window shrank."""
        self._ratios_W = ratios_W.detach().float().cpu()[-self.size :]
