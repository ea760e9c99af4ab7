"""Plans: right shapes and counts, and streams of randomness that belong to a sample alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_vico.vico import compression_plan as cp

ENDS_HALF = torch.tensor([0.125, 0.25, 0.25, 0.25, 0.125])


def plans_of(plan: Callable[..., Tensor], argument: object, number: int, **options: str) -> Tensor:
    """[number, N] float64: plans of as many samples or packs."""
    streams = (cp.generator(0, 0, index, "xi") for index in range(number))
    return torch.stack([plan(argument, generator=each, **options) for each in streams]).double()


def counts_of(plans: Tensor) -> Tensor:
    """How often 0, 1, ... of an image's tiles are compressed, as shares; [..., tiles] plans."""
    counts = plans.sum(dim=-1).long().flatten().bincount(minlength=plans.shape[-1] + 1)
    return counts / counts.sum()


def test_generator_depends_on_every_part_of_its_name() -> None:
    names = [(1, 0, 0, "xi"), (2, 0, 0, "xi"), (1, 1, 0, "xi"), (1, 0, 1, "xi"), (1, 0, 0, "tile")]
    draws = [torch.rand(4, generator=cp.generator(*name)) for name in names]
    assert all(not torch.equal(draws[0], other) for other in draws[1:])
    assert torch.equal(draws[0], torch.rand(4, generator=cp.generator(*names[0])))


def test_counts() -> None:
    assert cp.plan_none(3).tolist() == [False] * 3
    assert cp.plan_all(2).tolist() == [True] * 2
    for count in (0, 3, 7):
        plan = cp.plan_random_exact(7, count, generator=cp.generator(0, 0, 0, "r"))
        assert int(plan.sum()) == count
    for without_tiles in (cp.plan_stratified, cp.plan_fraction):
        assert without_tiles((), generator=cp.generator(0, 0, 0, "xi")).shape == (0,)


def test_fraction_has_a_uniform_share_for_each_image() -> None:
    """Of 4 tiles k are compressed with 1/5 for every k: its share integrated over xi ~ U[0, 1];
    with exact counts, round(4 xi), the ends get half as much.

    Measured deviations 0.011 (three standard errors are 0.020), 0.008.
    """
    plans = plans_of(cp.plan_fraction, (4, 4), 4000, sampler="bernoulli")
    assert plans.shape == (4000, 8)
    assert (counts_of(plans[:, :4]) - 0.2).abs().max() < 0.019
    plans = plans_of(cp.plan_fraction, (4, 4), 4000, sampler="exact-count")
    assert (counts_of(plans[:, :4]) - ENDS_HALF).abs().max() < 0.021


def test_images_of_a_sample_draw_their_own_share() -> None:
    shares = plans_of(cp.plan_fraction, (20, 20), 200).view(200, 2, 20).mean(dim=2)
    assert abs(torch.corrcoef(shares.T)[0, 1]) < 0.2  # measured 0.04


@pytest.mark.parametrize("num_images", [1, 3, 8])
def test_each_stratified_share_is_uniform(num_images: int) -> None:
    """Kolmogorov's distance to U[0, 1] of every image's share, over 1,000 packs; 1 % of true draws
    are above 0.052.

    Measured: 0.033 (1 image), 0.041 (worst of 3), 0.046 (worst of 8).
    """
    plans = plans_of(cp.plan_stratified, (200,) * num_images, 1000)
    shares = plans.view(1000, num_images, 200).mean(dim=2).sort(dim=0).values
    expected = (torch.arange(1000) + 0.5) / 1000
    assert (shares - expected[:, None]).abs().max() < 0.055


def test_strata_are_taken_once_each() -> None:
    """With many tiles an image the shares of a pack, in order, lie in their strata, up to a tile's
    rounding."""
    plans = plans_of(cp.plan_stratified, (500,) * 5, 50)
    shares = plans.view(50, 5, 500).mean(dim=2).sort(dim=1).values
    start = torch.arange(5) / 5
    assert ((shares >= start - 1 / 500) & (shares <= start + 1 / 5 + 1 / 500)).all()


def test_every_tile_is_compressed_with_probability_xi() -> None:
    """A tile's marginal probability is 1/2 in every place, also in small images: rounding is
    unbiased.

    Given xi it is xi: of two images one has its share in the lower half of [0, 1), 1/4 on average,
    and the other in the upper, 3/4; a large image tells which, and the image of one tile must
    follow. Measured: 0.022 from 1/2 (worst of 204; three standard errors are 0.024), 0.004 from 1/4
    and 3/4.
    """
    plans = plans_of(cp.plan_stratified, (1, 200, 3), 4000)
    assert (plans.mean(dim=0) - 0.5).abs().max() < 0.028
    pairs = plans_of(cp.plan_stratified, (1, 200), 4000)
    large_is_low = pairs[:, 1:].mean(dim=1) < 0.5
    assert abs(float(pairs[large_is_low, 0].mean()) - 0.75) < 0.03
    assert abs(float(pairs[~large_is_low, 0].mean()) - 0.25) < 0.03


def test_stratified_counts_are_uniform() -> None:
    """floor(4 xi + v): 0 and 4 tiles have probability 1/8, the others 1/4. Measured deviation
    0.005."""
    plans = plans_of(cp.plan_stratified, (4, 4), 2000).view(2000, 2, 4)
    assert (counts_of(plans) - ENDS_HALF).abs().max() < 0.02


def test_stratified_plans_have_their_own_stream() -> None:
    first, again, other = (
        cp.plan_stratified((9, 9), generator=cp.generator(0, 0, pack, "xi")) for pack in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def longest_over_mean(sampler: str, *, steps: int = 12) -> float:
    """Policy tokens of the data-parallel rank with most over the mean, averaged over steps.

    8 images of 12 tiles and 8,192 text tokens a pack, 32 packs on each of 8 ranks: the case of 96
    tiles in 32K tokens.
    """
    images, ratios = (12,) * 8, []
    for step in range(steps):
        tokens = torch.zeros(8)
        for pack in range(256):
            generator = cp.generator(0, step, pack, "xi")
            if sampler == "stratified":
                plan = cp.plan_stratified(images, generator=generator)
            else:
                plan = cp.plan_fraction(images, generator=generator, sampler=sampler)  # type: ignore[arg-type]
            tokens[pack % 8] += 8192 + 256 * len(plan) - 192 * int(plan.sum())
        ratios.append(float(tokens.max() / tokens.mean()))
    return sum(ratios) / steps


@pytest.mark.slow
def test_stratified_shares_balance_the_ranks() -> None:
    """Measured: stratified 1.0036, bernoulli 1.0214, exact-count 1.0170; a bound that independent
    shares fail."""
    assert longest_over_mean("stratified") < 1.005
    assert longest_over_mean("bernoulli") > 1.012
    assert longest_over_mean("exact-count") > 1.012


def test_one_tile_is_uniform() -> None:
    picks = plans_of(cp.plan_one_tile, 5, 2000)
    assert (picks.sum(dim=1) == 1).all()
    assert (picks.mean(dim=0) - 0.2).abs().max() < 0.03  # measured 0.018


def test_one_image_compresses_all_its_tiles_and_no_other() -> None:
    seen = plans_of(cp.plan_one_image, (1, 2, 3), 100).unique(dim=0)
    assert seen.tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: cp.plan_one_tile(0, generator=g), "at least one tile"),
        (lambda g: cp.plan_one_image((), generator=g), "at least one tile"),
        (lambda g: cp.plan_random_exact(2, 3, generator=g), r"num_compressed 3 is not in \[0, 2\]"),
        (lambda g: cp.plan_fraction((2,), generator=g, sampler="uniform"), "'uniform' is neither"),
    ],
)
def test_bad_requests(call: Callable[[torch.Generator], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(cp.generator(0, 0, 0, "x"))
