"""A sample to ids and tiles: tiling and template together, with the settings of both."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_vico.config.schema import TilingOptions
from megatron_vico.data.encode import conversation, tiling
from megatron_vico.data.encode.conversation import TileTags
from megatron_vico.data.encode.tokenizer import Tokenizer
from megatron_vico.data.samples import (
    BoolArray,
    ByteArray,
    ConversationSample,
    EncodedSample,
    IntArray,
)
from megatron_vico.errors import SampleError


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
        """The settings of a command's flags and its vision tower's `image_size`."""
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

        Args:
            random: the stream that augmentation draws from, where the sample has `data_augment`;
                None, for indexing and evaluation, leaves the tiles as they are.
        """
        encoded = self._encode(sample, conversation.encode_conversation)
        if random is None or not sample.data_augment:
            return encoded
        return replace(encoded, tiles=tiling.jpeg_degrade(encoded.tiles, random=random))

    def encode_blank(self, sample: ConversationSample) -> EncodedSample:
        """As `encode`, but with blank tiles: all counts and every error, far sooner."""
        return self._encode(sample, conversation.encode_conversation, cut=tiling.blank_tiles)

    def encode_prompt(self, sample: ConversationSample) -> EncodedSample:
        """Ids and tiles of a sample that ends with a question; nothing is a response."""
        return self._encode(sample, conversation.encode_prompt)

    def _encode(
        self,
        sample: ConversationSample,
        encode_text: Callable[..., tuple[IntArray, BoolArray]],
        *,
        cut: Callable[..., ByteArray] = tiling.tile,
    ) -> EncodedSample:
        settings = self.settings
        limit = sample.max_dynamic_patch or settings.max_dynamic_patch
        tiles_of_images = [
            cut(
                tiling.decode_image(encoded, key=sample.key, number=number),
                image_size=settings.image_size,
                # The official rule: a sample's images share the limit, thumbnails not counted.
                max_dynamic_patch=max(1, limit // len(sample.images)),
                use_thumbnail=settings.use_thumbnail,
            )
            for number, encoded in enumerate(sample.images)
        ]
        tiles_per_image = tuple(len(tiles) for tiles in tiles_of_images)
        token_ids, is_response = encode_text(
            sample.turns,
            tiles_per_image=tiles_per_image,
            tokenizer=self.tokenizer,
            tile_tags=settings.tile_tags,
            key=sample.key,
        )
        if len(tiles_of_images) == 1:
            (tiles,) = tiles_of_images
        else:
            shape = (0, 3, settings.image_size, settings.image_size)
            tiles = np.concatenate([np.empty(shape, dtype=np.uint8), *tiles_of_images])
        encoded = EncodedSample(
            key=sample.key,
            token_ids=token_ids,
            is_response=is_response,
            tiles=tiles,
            tiles_per_image=tiles_per_image,
        )
        check_image_tokens(encoded, image_token_id=self.tokenizer.image_token_id)
        return encoded


def check_image_tokens(sample: EncodedSample, *, image_token_id: int) -> None:
    """Check for one image token a tile, and for a token before each response token.

    Raises:
        SampleError: if not.
    """
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
