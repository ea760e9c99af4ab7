"""A picture of samples: a card each, with its text and its images under the grid of their tiles."""

import math
import re
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from megatron_vico.data.encode.tiling import decode_image
from megatron_vico.data.samples import ConversationSample
from megatron_vico.errors import SampleError
from megatron_vico.shard_tools.sample_view import ViewedImage

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in px; right and bottom are just outside."""

ViewedSample = tuple[ConversationSample, Sequence[ViewedImage]]

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

CARD_WIDTH = 560
_MARGIN, _PADDING, _GAP, _LINE = 16, 12, 8, 18
_MAX_LINES = {"with images": 2, "text only": 6}
"""Of the question, and of the answer."""

_THUMBNAIL_HEIGHTS = ((4, 150), (12, 100))
"""(Images of the sample up to which it holds, height of each in px)."""

_FRAME_HEIGHT = 60
"""Of each of more images, as a video has; they go without captions."""

_MAX_SHOWN = 56

_INKS = {"key": "#1f4e9c", "question": "black", "answer": "#1b6e2d", "note": "#666666"}
_GROUND, _CARD, _EDGE, _BROKEN = "#eceff3", "white", "#c3c9d1", "#f3c9c9"


def contact_sheet(
    samples: Sequence[ViewedSample], *, columns: int = 2
) -> tuple[Image.Image, list[list[Box]]]:
    """Draw samples, at least one, in columns of cards; and where each sample's shown images are."""
    cards = [_draw_card(*viewed) for viewed in samples]
    columns = min(columns, len(cards))
    bottoms = [_MARGIN] * columns
    corners = []
    for card, _ in cards:
        column = bottoms.index(min(bottoms))  # the shortest
        corners.append((_MARGIN + column * (CARD_WIDTH + _MARGIN), bottoms[column]))
        bottoms[column] += card.height + _MARGIN
    canvas = Image.new("RGB", (_MARGIN + columns * (CARD_WIDTH + _MARGIN), max(bottoms)), _GROUND)
    pen = ImageDraw.Draw(canvas)
    boxes = []
    for (card, on_card), (left, top) in zip(cards, corners, strict=True):
        canvas.paste(card, (left, top))
        edge = (left - 1, top - 1, left + CARD_WIDTH, top + card.height)
        pen.rectangle(edge, outline=_EDGE)
        boxes.append([(x + left, y + top, r + left, b + top) for x, y, r, b in on_card])
    return canvas, boxes


def _draw_card(
    sample: ConversationSample, images: Sequence[ViewedImage]
) -> tuple[Image.Image, list[Box]]:
    """A card, and where the images are on it."""
    font, small = ImageFont.load_default(14), ImageFont.load_default(12)
    inner = CARD_WIDTH - 2 * _PADDING
    shown = images[:_MAX_SHOWN]
    limit = _MAX_LINES["with images" if shown else "text only"]
    texts = {
        "key": wrap(sample.key, font, width=inner, limit=1),
        "question": wrap(_first(sample, "human"), font, width=inner, limit=limit),
        "answer": wrap(_first(sample, "gpt"), font, width=inner, limit=limit),
    }
    lines = [(ink, line) for ink, wrapped in texts.items() for line in wrapped]
    heights = [height for limit, height in _THUMBNAIL_HEIGHTS if len(images) <= limit]
    height = heights[0] if heights else _FRAME_HEIGHT
    captions = [_caption(image) if heights else "" for image in shown]
    pictures = [_thumbnail(image, height=height, width=inner, key=sample.key) for image in shown]
    cells = [
        (
            max(picture.width, math.ceil(small.getlength(caption))),
            picture.height + (_LINE if caption else 0),
        )
        for picture, caption in zip(pictures, captions, strict=True)
    ]
    top = _PADDING + _LINE * len(lines) + (_GAP if shown else 0)
    corners, bottom = _flow(cells, top=top, width=inner)
    notes = "" if shown and heights else _notes(images, len(shown))
    canvas = Image.new("RGB", (CARD_WIDTH, bottom + (_LINE if notes else 0) + _PADDING), _CARD)
    pen = ImageDraw.Draw(canvas)
    for number, (ink, line) in enumerate(lines):
        pen.text((_PADDING, _PADDING + number * _LINE), line, font=font, fill=_INKS[ink])
    boxes = []
    for picture, caption, (left, upper) in zip(pictures, captions, corners, strict=True):
        canvas.paste(picture, (left, upper))
        boxes.append((left, upper, left + picture.width, upper + picture.height))
        pen.text((left, boxes[-1][3] + 3), caption, font=small, fill=_INKS["note"])
    pen.text((_PADDING, bottom + 3), notes, font=small, fill=_INKS["note"])
    return canvas, boxes


def _flow(
    cells: Sequence[tuple[int, int]], *, top: int, width: int
) -> tuple[list[tuple[int, int]], int]:
    """Cells of (width, height) in rows, as words in a text; their corners, and the bottom."""
    corners = []
    left, bottom = _PADDING, top
    for cell_width, cell_height in cells:
        if left > _PADDING and left + cell_width > _PADDING + width:
            left, top = _PADDING, bottom + _GAP
        corners.append((left, top))
        left += cell_width + _GAP
        bottom = max(bottom, top + cell_height)
    return corners, bottom


def _thumbnail(image: ViewedImage, *, height: int, width: int, key: str) -> Image.Image:
    """The image at a height, or less where it is too wide, with its grid of tiles."""
    try:
        decoded = decode_image(image.content, key=key, number=0)
    except SampleError:
        return Image.new("RGB", (height, height), _BROKEN)
    scale = min(height / decoded.height, width / decoded.width)
    size = (max(1, round(decoded.width * scale)), max(1, round(decoded.height * scale)))
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    drawn = decoded.resize(size, how)
    pen = ImageDraw.Draw(drawn)
    right, bottom = drawn.size
    across = [n * right // image.columns for n in range(1, image.columns)]
    down = [n * bottom // image.rows for n in range(1, image.rows)]
    # Black beside white is seen on every photo.
    for colour, stroke in (("black", 3), ("white", 1)):
        for x in across:
            pen.line(((x, 0), (x, bottom)), fill=colour, width=stroke)
        for y in down:
            pen.line(((0, y), (right, y)), fill=colour, width=stroke)
    pen.rectangle((0, 0, right - 1, bottom - 1), outline="black")
    return drawn


def _caption(image: ViewedImage) -> str:
    size = f"{image.width}x{image.height}" if image.format else "cannot be opened"
    return f"{size}, {image.tiling}"


def _notes(images: Sequence[ViewedImage], num_shown: int) -> str:
    if not images:
        return "text only"
    num_tiles = sum(image.num_tiles for image in images)
    hidden = f"; the first {num_shown} are shown" if num_shown < len(images) else ""
    return f"{len(images)} images, {num_tiles} tiles{hidden}"


def _first(sample: ConversationSample, role: str) -> str:
    """The first text of a role on one line, without tags of images and numbers of frames."""
    roles = ("human", "pretrain") if role == "human" else (role,)
    text = next((turn.text for turn in sample.turns if turn.role in roles), "")
    return " ".join(re.sub(r"(Frame-?\d+: *)?<image>", " ", text).split())


def wrap(text: str, font: _Font, *, width: int, limit: int) -> list[str]:
    """Text in at most `limit` lines no wider than `width` px; "..." stands for what is cut off."""
    # textwrap counts characters: as many as fit in the mean, and fewer while a line is too wide.
    num_chars = max(4, int(width * len(text) / max(1, font.getlength(text))))
    while True:
        lines = textwrap.wrap(text, num_chars, max_lines=limit, placeholder="...")
        if num_chars == 4 or all(font.getlength(line) <= width for line in lines):
            return lines
        num_chars -= 1
