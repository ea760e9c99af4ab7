"""Eq. 2-3: means per sample, ratios, the window and its percentile."""

import numpy as np
import pytest
import torch

from megatron_vico.vico.router_targets import (
    RatioWindow,
    labels_from_ratios,
    loss_ratio,
    sample_means,
)


def test_sample_means() -> None:
    means = sample_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2, 2, 0]), 4)
    assert means.tolist() == [5.0, 0.0, 2.0, 0.0]


def test_ratio_of_equal_models_is_one_and_finite() -> None:
    zero = torch.zeros(3)
    assert loss_ratio(zero, zero, eps=1e-6).tolist() == [1.0, 1.0, 1.0]
    ratio = loss_ratio(torch.tensor([0.3]), torch.tensor([0.1]), eps=0.0)
    assert ratio.item() == pytest.approx(3.0)


def test_labels_compress_strictly_below_the_threshold() -> None:
    labels = labels_from_ratios(torch.tensor([0.9, 1.0, 1.1]), torch.tensor(1.0))
    assert labels.tolist() == [0, 1, 1]


def test_window_against_numpy_while_it_slides() -> None:
    window, seen = RatioWindow(size=50, percentile=60), np.zeros(0, dtype=np.float32)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        ratios = torch.rand(7, generator=generator)
        window.push(ratios)
        seen = np.concatenate([seen, ratios.numpy()])[-50:]
        assert window.threshold().item() == pytest.approx(float(np.percentile(seen, 60)), rel=1e-6)


def test_window_has_no_threshold_at_first_and_survives_a_checkpoint() -> None:
    window = RatioWindow(size=10, percentile=60)
    assert window.threshold().isnan()
    window.push(torch.arange(25.0))
    other = RatioWindow(size=10, percentile=60)
    other.load(window.state())
    assert torch.equal(other.state(), torch.arange(15.0, 25.0))
    assert other.threshold() == window.threshold()
    smaller = RatioWindow(size=4, percentile=60)
    smaller.load(window.state())
    assert smaller.state().tolist() == [21.0, 22.0, 23.0, 24.0]


def test_sixty_percent_of_new_ratios_fall_below_the_sixtieth_percentile() -> None:
    torch.manual_seed(0)
    window = RatioWindow(size=2048, percentile=60)
    window.push(torch.rand(2048))
    compress = (labels_from_ratios(torch.rand(5000), window.threshold()) == 0).float().mean()
    assert abs(compress - 0.6) < 0.02  # measured 0.001
