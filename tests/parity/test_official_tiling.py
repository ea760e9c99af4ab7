"""The choice of the grid equals the official algorithm, restated here literally, over sizes up to
4,000 px."""

import pytest

from megatron_vico.data.encode.tiling import choose_grid, grids

# Every size that matters for ties and thresholds (multiples of half a tile), and others that share
# no factor with 448.
SIZES = sorted(
    {
        *range(1, 4001, 61),
        *range(224, 4001, 224),
        2,
        3,
        7,
        27,
        28,
        29,
        447,
        449,
        1000,
        1920,
        3999,
        4000,
    }
)


def official_grid(width, height, *, max_num, image_size=448, min_num=1):
    """What `dynamic_preprocess` does before it resizes; the order of the set's elements is part of
    it."""
    candidates = set(  # noqa: C401 (a literal restatement)
        (i, j)
        for n in range(min_num, max_num + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if i * j <= max_num and i * j >= min_num
    )
    best, smallest = (1, 1), float("inf")
    for i, j in sorted(candidates, key=lambda ratio: ratio[0] * ratio[1]):
        difference = abs(width / height - i / j)
        if difference < smallest:
            best, smallest = (i, j), difference
        elif difference == smallest and width * height > 0.5 * image_size * image_size * i * j:
            best = (i, j)
    return best


@pytest.mark.parametrize("max_num", [1, 2, 6, 12])
def test_grid_equals_the_official_algorithm(max_num):
    sizes = SIZES if max_num == 12 else SIZES[::3]
    for width in sizes:
        for height in sizes:
            expected = official_grid(width, height, max_num=max_num)
            found = choose_grid(width, height, image_size=448, max_dynamic_patch=max_num)
            assert found == expected, (width, height)


def test_number_of_grids():
    assert len(grids(12)) == 35  # the official count for 12 tiles
