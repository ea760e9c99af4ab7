"""A picture of samples: a card each, with its text and its images, over which the grid of their
tiles is drawn."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from megatron_vico.data.encode.tiling import decode_image
from megatron_vico.errors import SampleError
from megatron_vico.shard_tools.sample_view import ViewedImage, ViewedSample

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in px; right and bottom are just outside."""

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

CARD_WIDTH = 560
_MARGIN = 16
_PADDING = 12
_GAP = 8
_LINE = 18
_TEXT_LINES = {"with images": 2, "text only": 6}
"""Most lines of the question, and of the answer."""

_THUMBNAIL_HEIGHTS = ((4, 150), (12, 100))
"""(Most images of the sample, height of each in px)."""
_FRAME_HEIGHT = 60
"""Of each of more images, as a video has; they go without captions."""
_MOST_SHOWN = 56

_INKS = {"key": "#1f4e9c", "question": "black", "answer": "#1b6e2d", "note": "#666666"}
_GROUND, _CARD, _EDGE, _BROKEN = "#eceff3", "white", "#c3c9d1", "#f3c9c9"


@dataclass(frozen=True, kw_only=True, eq=False)
class ContactSheet:
    """The picture, and where each image is in it."""

    picture: Image.Image
    """RGB."""

    boxes: tuple[tuple[Box, ...], ...]
    """Of each sample, of each of its images that is shown."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Card:
    picture: Image.Image
    boxes: tuple[Box, ...]


def contact_sheet(samples: Sequence[ViewedSample], *, columns: int = 2) -> ContactSheet:
    """Draw samples.

    Args:
        samples: in reading order; at least one.
        columns: cards in a row.

    Returns:
        The picture.
    """
    cards = [_draw_card(sample) for sample in samples]
    columns = min(columns, len(cards))
    bottoms = [_MARGIN] * columns
    places = []
    for card in cards:
        column = bottoms.index(min(bottoms))  # the shortest
        places.append((_MARGIN + column * (CARD_WIDTH + _MARGIN), bottoms[column]))
        bottoms[column] += card.picture.height + _MARGIN
    canvas = Image.new("RGB", (_MARGIN + columns * (CARD_WIDTH + _MARGIN), max(bottoms)), _GROUND)
    pen = ImageDraw.Draw(canvas)
    for card, (left, top) in zip(cards, places, strict=True):
        canvas.paste(card.picture, (left, top))
        pen.rectangle(
            (left - 1, top - 1, left + CARD_WIDTH, top + card.picture.height), outline=_EDGE
        )
    boxes = tuple(
        tuple((x0 + left, y0 + top, x1 + left, y1 + top) for x0, y0, x1, y1 in card.boxes)
        for card, (left, top) in zip(cards, places, strict=True)
    )
    return ContactSheet(picture=canvas, boxes=boxes)


def _draw_card(viewed: ViewedSample) -> _Card:
    font, small = ImageFont.load_default(14), ImageFont.load_default(12)
    inner = CARD_WIDTH - 2 * _PADDING
    shown = viewed.images[:_MOST_SHOWN]
    most = _TEXT_LINES["with images" if shown else "text only"]
    lines = [("key", line) for line in wrap(viewed.sample.key, font, width=inner, most=1)]
    lines += [
        ("question", line) for line in wrap(_first(viewed, "human"), font, width=inner, most=most)
    ]
    lines += [
        ("answer", line) for line in wrap(_first(viewed, "gpt"), font, width=inner, most=most)
    ]
    height = next(
        (px for most, px in _THUMBNAIL_HEIGHTS if len(viewed.images) <= most), _FRAME_HEIGHT
    )
    captions = [_caption(image) if height > _FRAME_HEIGHT else "" for image in shown]
    pictures = [
        _thumbnail(image, height=height, width=inner, key=viewed.sample.key) for image in shown
    ]
    top = _PADDING + _LINE * len(lines) + (_GAP if shown else 0)
    cells = [
        (
            max(picture.width, math.ceil(small.getlength(caption))),
            picture.height + (_LINE if caption else 0),
        )
        for picture, caption in zip(pictures, captions, strict=True)
    ]
    places, bottom = _flow(cells, top=top, width=inner)
    notes = (
        _notes(viewed, len(shown))
        if not all(captions) or not shown or len(shown) < len(viewed.images)
        else ""
    )
    canvas = Image.new("RGB", (CARD_WIDTH, bottom + (_LINE if notes else 0) + _PADDING), _CARD)
    pen = ImageDraw.Draw(canvas)
    for number, (kind, line) in enumerate(lines):
        pen.text((_PADDING, _PADDING + number * _LINE), line, font=font, fill=_INKS[kind])
    for picture, caption, (left, upper) in zip(pictures, captions, places, strict=True):
        canvas.paste(picture, (left, upper))
        pen.text((left, upper + picture.height + 3), caption, font=small, fill=_INKS["note"])
    pen.text((_PADDING, bottom + 3), notes, font=small, fill=_INKS["note"])
    boxes = [
        (left, upper, left + each.width, upper + each.height)
        for each, (left, upper) in zip(pictures, places, strict=True)
    ]
    return _Card(picture=canvas, boxes=tuple(boxes))


def _flow(
    cells: Sequence[tuple[int, int]], *, top: int, width: int
) -> tuple[list[tuple[int, int]], int]:
    """Cells of (width, height) in rows, as words in a text; their corners, and the bottom of the
    last row."""
    places = []
    left, bottom = _PADDING, top
    for cell_width, cell_height in cells:
        if left > _PADDING and left + cell_width > _PADDING + width:
            left, top = _PADDING, bottom + _GAP
        places.append((left, top))
        left += cell_width + _GAP
        bottom = max(bottom, top + cell_height)
    return places, bottom


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
    ends = (drawn.width, drawn.height)
    lines = [
        (axis, part * ends[axis] // count)
        for axis, count in enumerate((image.columns, image.rows))
        for part in range(1, count)
    ]
    # Black beside white is seen on every photo.
    for colour, stroke in (("black", 3), ("white", 1)):
        for axis, at in lines:
            line = ((at, 0), (at, ends[1])) if axis == 0 else ((0, at), (ends[0], at))
            pen.line(line, fill=colour, width=stroke)
    pen.rectangle((0, 0, drawn.width - 1, drawn.height - 1), outline="black")
    return drawn


def _caption(image: ViewedImage) -> str:
    if not image.format:
        return f"cannot be opened, {image.tiling}"
    return f"{image.width}x{image.height}, {image.tiling}"


def _notes(viewed: ViewedSample, num_shown: int) -> str:
    if not viewed.images:
        return "text only"
    num_tiles = sum(image.num_tiles for image in viewed.images)
    hidden = f"; the first {num_shown} are shown" if num_shown < len(viewed.images) else ""
    return f"{len(viewed.images)} images, {num_tiles} tiles{hidden}"


def _first(viewed: ViewedSample, role: str) -> str:
    """The first text of a role on one line, without the tags of images and the numbers of
    frames."""
    roles = ("human", "pretrain") if role == "human" else (role,)
    text = next((turn.text for turn in viewed.sample.turns if turn.role in roles), "")
    return " ".join(re.sub(r"(Frame-?\d+: *)?<image>", " ", text).split())


def wrap(text: str, font: _Font, *, width: int, most: int) -> list[str]:
    """Lines that are no wider than `width` px, at most `most` of them; a word that is too long is
    broken.

    Args:
        text: one line.
        font: measures.
        width: in px.
        most: lines; what does not fit is replaced by "...".

    Returns:
        The lines; none if there is no text.
    """
    lines: list[str] = []
    rest = text.strip()
    while rest:
        is_last = len(lines) == most - 1
        if font.getlength(rest) <= width:
            return [*lines, rest]
        end = _fitting(rest + " ", font, width=width, tail="..." if is_last else "")
        if is_last:
            return [*lines, rest[:end].rstrip() + "..."]
        space = rest.rfind(" ", 0, end + 1)
        end = space if space > 0 else max(1, end)
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return lines


def _fitting(text: str, font: _Font, *, width: int, tail: str) -> int:
    """The most characters of `text` that, with `tail`, are no wider than `width`."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if font.getlength(text[:middle].rstrip() + tail) <= width:
            low = middle
        else:
            high = middle - 1
    return low
