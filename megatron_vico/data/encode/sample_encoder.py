"""A sample to ids and tiles: tiling and template together, with the settings of both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_vico.config.registry import MAX_TILES
from megatron_vico.config.schema import TilingOptions
from megatron_vico.data.encode import conversation, tiling
from megatron_vico.data.encode.conversation import TileTags
from megatron_vico.data.encode.image_file import check_pixels
from megatron_vico.data.encode.tokenizer import IMAGE_START, Tokenizer
from megatron_vico.data.samples import (
    BoolArray,
    ByteArray,
    ConversationSample,
    EncodedSample,
    IntArray,
)
from megatron_vico.errors import ConfigError, SampleError


@dataclass(frozen=True, kw_only=True)
class EncodingSettings:
    """What a sample's tokens and tiles depend on besides the tokenizer; kept in shard indexes."""

    image_size: int
    """Side S of a tile in px."""

    max_dynamic_patch: int = 12
    """Most tiles of one image, thumbnail not counted; a sample may have its own."""

    use_thumbnail: bool = True
    """Append the whole image as one more tile when it was cut into several."""

    tile_tags: TileTags = "none"
    """Text before each tile."""

    @classmethod
    def from_options(cls, options: TilingOptions, *, image_size: int) -> "EncodingSettings":
        """The settings of a command's flags and its vision tower's `image_size`.

        Raises:
            ConfigError: if an image may have no tile, or more than any needs.
        """
        if not 1 <= options.max_dynamic_patch <= MAX_TILES:
            raise ConfigError(
                f"--max-dynamic-patch {options.max_dynamic_patch}: expected 1 to {MAX_TILES}."
            )
        return cls(
            image_size=image_size,
            max_dynamic_patch=options.max_dynamic_patch,
            use_thumbnail=options.use_thumbnail,
            tile_tags=options.tile_tags,
        )


@dataclass(frozen=True, kw_only=True)
class SampleEncoder:
    """Turns samples into ids and tiles.

    Each of its methods raises SampleError if an image is broken, or tags, turns and images do not
    match.
    """

    tokenizer: Tokenizer
    settings: EncodingSettings

    def encode(
        self, sample: ConversationSample, *, random: torch.Generator | None = None
    ) -> EncodedSample:
        """Ids, response mask and tiles of a sample with its answers.

        Augmentation draws from `random`, where the sample has `data_augment`; None, for indexing
        and evaluation, leaves the tiles as they are.
        """
        encoded = self._encode(sample, tiling.tile)
        if random is None or not sample.data_augment:
            return encoded
        return replace(encoded, tiles=tiling.jpeg_degrade(encoded.tiles, random=random))

    def encode_blank(self, sample: ConversationSample) -> EncodedSample:
        """As `encode`, but with blank tiles: all counts and every error, far sooner."""
        return self._encode(sample, tiling.blank_tiles)

    def encode_prompt(
        self, sample: ConversationSample, *, tiles_of_image: Sequence[int] | None = None
    ) -> list[EncodedSample]:
        """The parts of a conversation that ends with a question, each with its own tiles.

        Nothing of them is a response. `tiles_of_image`: most tiles of each; None, the usual limit.
        """
        images = self._tiles(sample, tiling.tile, tiles_of_image)
        parts = conversation.encode_prompt(
            sample.turns,
            tiles_per_image=[len(tiles) for tiles in images],
            tokenizer=self.tokenizer,
            tile_tags=self.settings.tile_tags,
            image_tag=sample.image_tag,
            key=sample.key,
        )
        encoded = list[EncodedSample]()
        for token_ids in parts:
            num_images = int(np.count_nonzero(token_ids == self.tokenizer.token_id(IMAGE_START)))
            of_part, images = images[:num_images], images[num_images:]
            nothing = np.zeros(token_ids.size, np.bool_)
            encoded.append(self._encoded(sample.key, token_ids, nothing, of_part))
        return encoded

    def _encode(self, sample: ConversationSample, cut: Callable[..., ByteArray]) -> EncodedSample:
        images = self._tiles(sample, cut, None)
        token_ids, is_response = conversation.encode_conversation(
            sample.turns,
            tiles_per_image=[len(tiles) for tiles in images],
            tokenizer=self.tokenizer,
            tile_tags=self.settings.tile_tags,
            key=sample.key,
        )
        return self._encoded(sample.key, token_ids, is_response, images)

    def _tiles(
        self,
        sample: ConversationSample,
        cut: Callable[..., ByteArray],
        tiles_of_image: Sequence[int] | None,
    ) -> list[ByteArray]:
        check_pixels(sample.images, key=sample.key)
        if tiles_of_image is None:
            # The official rule: a sample's images share the limit, thumbnails not counted.
            limit = sample.max_dynamic_patch or self.settings.max_dynamic_patch
            share = max(1, limit // max(len(sample.images), 1))
            tiles_of_image = [share] * len(sample.images)
        return [
            cut(
                tiling.decode_image(encoded, key=sample.key, number=number),
                image_size=self.settings.image_size,
                max_dynamic_patch=most,
                use_thumbnail=self.settings.use_thumbnail,
            )
            for number, (encoded, most) in enumerate(
                zip(sample.images, tiles_of_image, strict=True)
            )
        ]

    def _encoded(
        self, key: str, token_ids: IntArray, is_response: BoolArray, images: Sequence[ByteArray]
    ) -> EncodedSample:
        if len(images) == 1:
            (tiles,) = images
        else:
            shape = (0, 3, self.settings.image_size, self.settings.image_size)
            tiles = np.concatenate([np.empty(shape, dtype=np.uint8), *images])
        encoded = EncodedSample(
            key=key,
            token_ids=token_ids,
            is_response=is_response,
            tiles=tiles,
            tiles_per_image=tuple(len(each) for each in images),
        )
        check_image_tokens(encoded, image_token_id=self.tokenizer.image_token_id)
        return encoded


def check_image_tokens(sample: EncodedSample, *, image_token_id: int) -> None:
    """SampleError unless there is one image token a tile, and one before each response token."""
    num_placeholders = int(np.count_nonzero(sample.token_ids == image_token_id))
    if num_placeholders != sample.num_tiles or sum(sample.tiles_per_image) != sample.num_tiles:
        raise SampleError(
            f"sample {sample.key!r}: {num_placeholders} image placeholders but {sample.num_tiles}"
            f" tiles ({sum(sample.tiles_per_image)} over its images); check the <image> tags of the"
            " conversation."
        )
    if sample.is_response[:1].any():
        raise SampleError(
            f"sample {sample.key!r}: the first token is a response; nothing predicts it."
        )
