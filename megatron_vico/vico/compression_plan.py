"""Where compression plans come from: one bool a tile, True where it gets 64 tokens and not 256.

Eq. 1 (a fraction xi of each image), Eq. 2 (one tile), the rows of Table 3 (all, random) and
inference (ViR's scores, vico/routing.py) differ only in the function that makes the plan.

Shape suffixes: N tiles.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def generator(seed: int, epoch: int, sample_id: int, purpose: str) -> torch.Generator:
    """A random stream of one sample, epoch and purpose (such as "xi"), on any rank or worker."""
    name = f"{seed}/{epoch}/{sample_id}/{purpose}"
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    # manual_seed takes 63 bits.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def plan_none(num_tiles: int) -> Tensor:
    """Nothing compressed, [N]: the reference's plan, and the vanilla row of Table 3."""
    return torch.zeros(num_tiles, dtype=torch.bool)


def plan_all(num_tiles: int) -> Tensor:
    """Everything compressed, [N]: the "All Compress" row of Table 3."""
    return torch.ones(num_tiles, dtype=torch.bool)


def plan_fraction(
    tiles_per_image: Sequence[int],
    *,
    generator: torch.Generator,
    sampler: Literal["bernoulli", "exact-count"] = "bernoulli",
) -> Tensor:
    """A share xi ~ U[0, 1] of each image's tiles compressed; the expectation of Eq. 1.

    Args:
        tiles_per_image: of the sample, in order.
        generator: the sample's random stream.
        sampler: each tile with probability xi, or exactly round(xi * N) tiles of the image.

    Returns:
        [N] bool over all tiles of the sample.

    """
    if sampler not in ("bernoulli", "exact-count"):
        raise ValueError(f"sampler {sampler!r} is neither 'bernoulli' nor 'exact-count'")
    plans = []
    for num_tiles in tiles_per_image:
        xi = torch.rand((), generator=generator)
        if sampler == "bernoulli":
            plans.append(torch.rand(num_tiles, generator=generator) < xi)
        else:
            plans.append(
                plan_random_exact(num_tiles, int(torch.round(xi * num_tiles)), generator=generator)
            )
    return torch.cat(plans) if plans else plan_none(0)


def plan_stratified(tiles_per_image: Sequence[int], *, generator: torch.Generator) -> Tensor:
    """As `plan_fraction`, but the shares of a pack are spread evenly over [0, 1); Eq. 1.

    Of the K images of a pack, in random order, one gets its share from each of the K strata [k / K,
    (k + 1) / K). Each image's own share stays exactly U[0, 1] and each of its tiles is compressed
    with probability xi, so the expectation of Eq. 1 is that of independent shares; but packs have
    nearly the same number of policy tokens. With 8 images a pack and 32 packs on each of 8
    data-parallel ranks, the rank with most has 0.2 % more than the mean, not 2 %.

    Args:
        tiles_per_image: tiles of each image of the PACK, over all its samples, in order.
        generator: the pack's random stream.

    Returns:
        [N] bool over all tiles of the pack.
    """
    if not tiles_per_image:
        return plan_none(0)
    num_images = len(tiles_per_image)
    counts = torch.tensor(tiles_per_image, dtype=torch.int64)
    jitter, rounding = torch.rand(2, num_images, generator=generator, dtype=torch.float64)
    xi = (torch.randperm(num_images, generator=generator) + jitter) / num_images
    # Rounded up as often as the fraction says: the expected number is exactly xi * N. The clamp is
    # for xi rounded to 1.
    num_compressed = torch.minimum((xi * counts + rounding).floor().to(torch.int64), counts)
    return torch.cat(
        [
            plan_random_exact(num_tiles, chosen, generator=generator)
            for num_tiles, chosen in zip(tiles_per_image, num_compressed.tolist(), strict=True)
        ]
    )


def plan_random_exact(num_tiles: int, num_compressed: int, *, generator: torch.Generator) -> Tensor:
    """Exactly `num_compressed` random tiles, [N]: the "Random Compress" row of Table 3."""
    if not 0 <= num_compressed <= num_tiles:
        raise ValueError(f"num_compressed {num_compressed} is not in [0, {num_tiles}]")
    plan = plan_none(num_tiles)
    plan[torch.randperm(num_tiles, generator=generator)[:num_compressed]] = True
    return plan


def plan_one_tile(num_tiles: int, *, generator: torch.Generator) -> Tensor:
    """One random tile compressed, [N]: the question that Eq. 2 asks of each sample."""
    if num_tiles < 1:
        raise ValueError(
            "plan_one_tile needs at least one tile; leave text-only samples out of router training"
        )
    return plan_random_exact(num_tiles, 1, generator=generator)


def plan_one_image(tiles_per_image: Sequence[int], *, generator: torch.Generator) -> Tensor:
    """All tiles of one random image, [N]: Eq. 2 for the image-level router of Table 3."""
    if not any(tiles_per_image):
        raise ValueError(
            "plan_one_image needs at least one tile; leave text-only samples out of router training"
        )
    image = int(torch.randint(len(tiles_per_image), (), generator=generator))
    plan = plan_none(sum(tiles_per_image))
    start = sum(tiles_per_image[:image])
    plan[start : start + tiles_per_image[image]] = True
    return plan
