"""Whole images with what the router decided about each tile (ViCO paper, Figures 3-5)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_GREY = (128, 128, 128)
_SHADE = 0.62
_GAP_PX = 2
_MARGIN_PX = 12
_MIN_TILE_PX = 112
"""Smaller tiles leave no room for their numbers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedImage:
    """An image and the decisions about its tiles, row by row, without the thumbnail."""

    picture: Image.Image
    columns: int
    """Tiles in a row of the image; divides their number."""

    compressed: Sequence[bool]
    """[N], True where the tile is compressed."""

    probability: Sequence[float]
    """[N], p_compress in [0, 1], printed on the tile."""

    title: str = ""
    """Line above the image."""


def routing_picture(
    images: Sequence[RoutedImage],
    *,
    tokens: tuple[int, int],
    tile_px: int | None = None,
    columns: int = 4,
) -> Image.Image:
    """Images side by side, compressed tiles shaded grey, p_compress printed on each tile.

    `tokens`: visual tokens of a tile that is kept, and of one that is compressed. A tile gets
    `tile_px` pixels along its longer side; unset, those that it has, but 112 or more. Pixels of
    smaller tiles are repeated, not blurred.
    """
    drawn = [_draw_image(image, tile_px=tile_px) for image in images]
    columns = min(columns, len(drawn))
    cell_width = max(picture.width for picture in drawn) + _MARGIN_PX
    cell_height = max(picture.height for picture in drawn) + _MARGIN_PX
    rows = math.ceil(len(drawn) / columns)
    font = ImageFont.load_default(max(14, min(28, cell_width // 28)))
    caption = f"grey: {tokens[1]} of {tokens[0]} visual tokens; number: the router's p_compress"
    line_height = int(font.getbbox(caption)[3]) + _MARGIN_PX
    title_height = line_height if any(image.title for image in images) else 0
    cell_height += title_height
    size = (columns * cell_width + _MARGIN_PX, rows * cell_height + _MARGIN_PX + line_height)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for index, (picture, image) in enumerate(zip(drawn, images, strict=True)):
        left = _MARGIN_PX + index % columns * cell_width
        top = _MARGIN_PX + index // columns * cell_height
        pen.text((left, top), image.title, fill="black", font=font)
        canvas.paste(picture, (left, top + title_height))
    bottom = (_MARGIN_PX, rows * cell_height + _MARGIN_PX)
    pen.text(bottom, caption, fill="black", font=font)
    return canvas


def _draw_image(image: RoutedImage, *, tile_px: int | None) -> Image.Image:
    rows = len(image.compressed) // image.columns
    own = image.picture.convert("RGB")
    longer = max(own.width / image.columns, own.height / rows)
    scale = (tile_px or max(longer, _MIN_TILE_PX)) / longer
    width = max(1, round(own.width * scale / image.columns))
    height = max(1, round(own.height * scale / rows))
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    whole = own.resize((width * image.columns, height * rows), how)
    pitch_x, pitch_y = width + _GAP_PX, height + _GAP_PX
    size = (image.columns * pitch_x - _GAP_PX, rows * pitch_y - _GAP_PX)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(max(10, min(width, height) // 8))
    for index, (compressed, probability) in enumerate(
        zip(image.compressed, image.probability, strict=True)
    ):
        row, column = divmod(index, image.columns)
        corner = (column * width, row * height)
        pixels = whole.crop((*corner, corner[0] + width, corner[1] + height))
        if compressed:
            pixels = Image.blend(pixels, Image.new("RGB", pixels.size, _GREY), _SHADE)
        left, top = column * pitch_x, row * pitch_y
        canvas.paste(pixels, (left, top))
        text = f"{probability:.2f}"
        # Half way down the left edge it hides least of a tile with something in its corners or its
        # middle; it has a ground of its own since no colour of text can be read on every photo.
        place = (left + 3, top + height // 2)
        box = pen.textbbox(place, text, font=font, anchor="lm")
        pen.rectangle(
            (left, box[1] - 2, box[2] + 2, box[3] + 2), fill="black" if compressed else "white"
        )
        pen.text(place, text, font=font, anchor="lm", fill="white" if compressed else "black")
    return canvas
