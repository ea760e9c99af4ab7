"""Plans: right shapes and counts, and streams of randomness that belong to a sample alone."""

import pytest
import torch

from megatron_vico.vico import compression_plan as cp


def test_generator_depends_on_every_part_of_its_name() -> None:
    names = [(1, 0, 0, "xi"), (2, 0, 0, "xi"), (1, 1, 0, "xi"), (1, 0, 1, "xi"), (1, 0, 0, "tile")]
    draws = [torch.rand(4, generator=cp.generator(*name)) for name in names]
    assert all(not torch.equal(draws[0], other) for other in draws[1:])
    assert torch.equal(draws[0], torch.rand(4, generator=cp.generator(*names[0])))


def test_fixed_plans() -> None:
    assert cp.plan_none(3).tolist() == [False] * 3
    assert cp.plan_all(2).tolist() == [True] * 2


@pytest.mark.parametrize("sampler", ["bernoulli", "exact-count"])
def test_fraction_has_a_uniform_share_for_each_image(sampler: str) -> None:
    counts = torch.zeros(5)
    for sample in range(4000):
        plan = cp.plan_fraction((4, 4), generator=cp.generator(0, 0, sample, "xi"), sampler=sampler)
        assert plan.shape == (8,)
        counts[int(plan[:4].sum())] += 1
    share = counts / counts.sum()
    if sampler == "bernoulli":
        # The share of k compressed tiles of 4, integrated over xi ~ U[0, 1], is 1/5 for every k.
        # Measured deviation 0.011; three standard errors are 0.020.
        assert (share - 0.2).abs().max() < 0.019
    else:
        # round(4 xi): ends get half as much. Measured deviation 0.008.
        assert (share - torch.tensor([0.125, 0.25, 0.25, 0.25, 0.125])).abs().max() < 0.021


def test_images_of_a_sample_draw_their_own_share() -> None:
    plans = [cp.plan_fraction((20, 20), generator=cp.generator(0, 0, s, "xi")) for s in range(200)]
    first = torch.stack([plan[:20].float().mean() for plan in plans])
    second = torch.stack([plan[20:].float().mean() for plan in plans])
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.2  # measured 0.04


def test_no_tiles() -> None:
    assert cp.plan_fraction((), generator=cp.generator(0, 0, 0, "xi")).shape == (0,)


def test_one_tile_is_uniform() -> None:
    picks = torch.stack([cp.plan_one_tile(5, generator=cp.generator(0, 0, s, "tile")) for s in range(2000)])
    assert (picks.sum(dim=1) == 1).all()
    assert (picks.float().mean(dim=0) - 0.2).abs().max() < 0.03  # measured 0.018


def test_one_image_compresses_all_its_tiles_and_no_other() -> None:
    seen = {tuple(cp.plan_one_image((1, 2, 3), generator=cp.generator(0, 0, s, "image")).tolist()) for s in range(100)}
    assert seen == {
        (True, False, False, False, False, False),
        (False, True, True, False, False, False),
        (False, False, False, True, True, True),
    }


def test_exact_count() -> None:
    for count in (0, 3, 7):
        assert int(cp.plan_random_exact(7, count, generator=cp.generator(0, 0, 0, "r")).sum()) == count


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: cp.plan_one_tile(0, generator=g), "at least one tile"),
        (lambda g: cp.plan_one_image((), generator=g), "at least one tile"),
        (lambda g: cp.plan_random_exact(2, 3, generator=g), r"num_compressed 3 is not in \[0, 2\]"),
        (lambda g: cp.plan_fraction((2,), generator=g, sampler="uniform"), "'uniform' is neither"),
    ],
)
def test_bad_requests(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call(cp.generator(0, 0, 0, "x"))
