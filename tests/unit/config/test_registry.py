"""Sizes against the published parameter counts, by formula."""

import pytest

from megatron_vico.config.registry import get_model_config

# ViT, connector_4x, language model, connector_16x, ViR of the released InternVL3.5-Flash
# checkpoints. The totals of the 1B, 8B and 2B-Flash checkpoints as published (bytes on disk) agree
# with these.
PUBLISHED = {
    "internvl3_5-1b": (304_012_288, 5_253_120, 751_632_384, 39_883_776, 50_390_018),
    "internvl3_5-2b": (304_012_288, 12_595_200, 2_031_739_904, 92_317_696, 50_390_018),
    "internvl3_5-4b": (304_012_288, 17_052_672, 4_411_424_256, 123_253_248, 50_390_018),
    "internvl3_5-8b": (304_012_288, 33_570_816, 8_190_735_360, 234_934_272, 50_390_018),
    "internvl3_5-14b": (304_012_288, 47_204_352, 14_768_307_200, 325_116_928, 50_390_018),
    "internvl3_5-38b": (5_536_496_000, 91_786_240, 32_762_123_264, 681_702_400, 491_702_402),
    "internvl3_5-30b-a3b": (304_012_288, 12_595_200, 30_532_122_624, 92_317_696, 50_390_018),
    "internvl3_5-241b-a28b": (5_536_496_000, 69_239_808, 235_093_634_560, 520_216_576, 491_702_402),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_formula_gives_the_published_counts(name: str) -> None:
    """Those of the modules themselves too: tests/unit/convert/test_names.py has every tensor."""
    counts = get_model_config(name).parameter_counts()
    found = (counts.vit, counts.connector_4x, counts.language_model)
    assert (*found, counts.connector_16x, counts.vir) == PUBLISHED[name]


def test_image_tokens_of_a_tile() -> None:
    assert get_model_config("internvl3_5-8b").visual_tokens_per_tile == 256
    assert get_model_config("internvl3_5-8b").compressed_tokens_per_tile == 64
    assert get_model_config("toy").visual_tokens_per_tile == 4
    assert get_model_config("toy").compressed_tokens_per_tile == 1
