"""Packs of random samples of given lengths, without shards or a tokenizer."""

from dataclasses import dataclass

import numpy as np

from megatron_vico.config.registry import ModelConfig
from megatron_vico.config.stages import Stage
from megatron_vico.data.load.packed_bytes import PackedBytes, wrap
from megatron_vico.data.pack.builder import PackBuilder
from megatron_vico.data.pack.plan import Pack
from megatron_vico.data.samples import EncodedSample


@dataclass(frozen=True, kw_only=True)
class PackShape:
    """What samples a pack has: each an image, then text of which the second half is the answer."""

    tiles: tuple[int, ...]
    """Tiles of each sample."""

    text_lens: tuple[int, ...]
    """Text tokens of each sample, at least 2."""

    @classmethod
    def of_length(
        cls, num_tokens: int, *, model: ModelConfig, visual_share: float = 0.75
    ) -> "PackShape":
        """Four samples of unequal length that fill a pack of `num_tokens` reference tokens."""
        num_tiles = round(num_tokens * visual_share / model.visual_tokens_per_tile)
        num_text = num_tokens - num_tiles * model.visual_tokens_per_tile
        # 9 : 7 : 5 : 3 of the tiles and as much text in each.
        ends = [round(num_tiles * share / 24) for share in (0, 9, 16, 21, 24)]
        text_ends = [num_text * sample // 4 for sample in range(5)]
        return cls(
            tiles=tuple(np.diff(ends).tolist()), text_lens=tuple(np.diff(text_ends).tolist())
        )


def synthetic_pack(
    shape: PackShape,
    *,
    model: ModelConfig,
    stage: Stage,
    number: int,
    samples_in_global_batch: int,
    tile_size: int | None = None,
) -> PackedBytes:
    """A pack of random tokens and pixels as a loader gives it, seeded by `number`."""
    random = np.random.default_rng(number)
    size = tile_size or model.vision.image_size
    pairs = zip(shape.tiles, shape.text_lens, strict=True)
    samples = [_sample(*pair, model, random, size=size) for pair in pairs]
    builder = PackBuilder(
        stage=stage,
        seed=1,
        tokens_kept=model.visual_tokens_per_tile,
        tokens_compressed=model.compressed_tokens_per_tile,
        image_token_id=model.image_token_id,
    )
    ids = tuple(range(number * len(samples), (number + 1) * len(samples)))
    pack = Pack(sample_ids=ids, visits=(0,) * len(ids))
    packed = builder.build(samples, pack=pack, samples_in_global_batch=samples_in_global_batch)
    return wrap([packed], [sample.tiles for sample in samples])


def _sample(
    num_tiles: int, num_text: int, model: ModelConfig, random: np.random.Generator, *, size: int
) -> EncodedSample:
    text = random.integers(model.image_token_id + 1, model.language.vocab_size, num_text)
    return EncodedSample(
        key="synthetic",
        token_ids=np.concatenate([np.full(num_tiles, model.image_token_id), text]),
        is_response=np.arange(num_tiles + num_text) >= num_tiles + num_text // 2,
        tiles=random.integers(0, 256, (num_tiles, 3, size, size), dtype=np.uint8),
        tiles_per_image=(num_tiles,) if num_tiles else (),
    )
