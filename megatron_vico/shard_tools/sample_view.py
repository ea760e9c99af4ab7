"""A sample as a person sees it: how its images are cut, its text with what is trained marked."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vico.data.encode.image_file import open_image
from megatron_vico.data.encode.sample_encoder import EncodingSettings, SampleEncoder
from megatron_vico.data.encode.tiling import grids
from megatron_vico.data.encode.tokenizer import IMAGE_CONTEXT
from megatron_vico.data.samples import ConversationSample

TRAINED = ("[+", "+]")
"""Around text that is trained, as wdiff marks what is new."""


@dataclass(frozen=True, kw_only=True)
class ViewedImage:
    """An image file, and the tiles that the index says it is cut into."""

    content: bytes
    format: str = ""
    """PNG, JPEG, ...; empty if the file is no image."""

    width: int = 0
    """In px; 0 if the file is no image."""

    height: int = 0
    num_tiles: int
    """Thumbnail included."""

    columns: int = 1
    """Of the grid of tiles."""

    rows: int = 1

    @property
    def tiling(self) -> str:
        """Such as `1 tile` or `3x2+1 tiles`: the grid and the thumbnail."""
        if self.num_tiles == 1:
            return "1 tile"
        thumbnail = "+1" if self.num_tiles > self.columns * self.rows else ""
        return f"{self.columns}x{self.rows}{thumbnail} tiles"

    def __str__(self) -> str:
        """Format and size in px, where the file is an image."""
        if not self.format:
            return "CANNOT BE OPENED"
        return f"{self.format} {self.width}x{self.height}"


def view_image(content: bytes, num_tiles: int, settings: EncodingSettings) -> ViewedImage:
    """Look at an image, of which only the header is read; tiles and settings as the index has."""
    try:
        with open_image(content) as image:
            (width, height), image_format = image.size, image.format or "?"
    except Exception:  # broken bytes end in anything
        return ViewedImage(content=content, num_tiles=num_tiles)
    area = num_tiles - (settings.use_thumbnail and num_tiles > 1)
    # Among grids of one area the closest shape is the one that was chosen, whatever the sample's
    # budget was.
    columns, rows = min(
        (grid for grid in grids(area) if grid[0] * grid[1] == area),
        key=lambda grid: abs(width / height - grid[0] / grid[1]),
    )
    return ViewedImage(
        content=content,
        format=image_format,
        width=width,
        height=height,
        num_tiles=num_tiles,
        columns=columns,
        rows=rows,
    )


def image_lines(images: Sequence[ViewedImage]) -> list[str]:
    """A line for each run of images of one format, size and tiling (the frames of a video are)."""
    lines, first = [], 0
    for (looks, tiling), group in itertools.groupby(images, key=lambda one: (str(one), one.tiling)):
        sizes = sorted(len(image.content) for image in group)
        last = first + len(sizes) - 1
        name = f"image {first}" if first == last else f"images {first} to {last}"
        size = f"{sizes[0]:,}" if sizes[0] == sizes[-1] else f"{sizes[0]:,} to {sizes[-1]:,}"
        lines.append(f"{name}: {looks}, {size} bytes, {tiling}")
        first = last + 1
    return lines


def turn_lines(sample: ConversationSample) -> list[str]:
    """The raw turns; answers, which are trained, are marked."""
    return [
        f"{turn.role}: {_marked(turn.text, turn.role in ('gpt', 'pretrain'))}"
        for turn in sample.turns
    ]


def token_text(sample: ConversationSample, *, encoder: SampleEncoder) -> str:
    """What the model sees, special tokens included, in several lines; image tokens are counted."""
    encoded = encoder.encode(sample)
    image_token = encoder.tokenizer.image_token_id
    pieces = []
    tokens = zip(encoded.token_ids.tolist(), encoded.is_response.tolist(), strict=True)
    for (is_trained, is_image), run in itertools.groupby(
        tokens, key=lambda pair: (pair[1], pair[0] == image_token)
    ):
        ids = [token for token, _ in run]
        text = f"{IMAGE_CONTEXT}*{len(ids)}" if is_image else encoder.tokenizer.decode(ids)
        pieces.append(_marked(text, is_trained))
    return "".join(pieces)


def _marked(text: str, is_trained: bool) -> str:
    return text.join(TRAINED) if is_trained else text
