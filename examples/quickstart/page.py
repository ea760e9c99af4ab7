"""A page as a router meets one: a real photograph, a heading, a chart, columns of figures, margins.

6x4 tiles of 32 px. The photograph (scikit-learn's china.jpg) and the figures are in no split of the
demo's data, and no image that the models saw has more than 2x2 tiles.

Run: python examples/quickstart/page.py --out runs/demo/page.png
"""

import argparse
from pathlib import Path

import numpy as np
import sklearn
from PIL import Image, ImageDraw
from tiles import DENSE_FONT_PX, GLYPH_FONT_PX, TILE_SIZE, load_font

PHOTOGRAPH = Path(sklearn.__file__).parent / "datasets" / "images" / "china.jpg"
COLUMNS, ROWS = 6, 4
PHOTO_TILES = 3
"""The photograph's tiles, each way; the heading stands below it."""

PAPER, INK = (244, 240, 230), (40, 40, 60)
HEADING = "208"
BARS = (0.8, 0.45, 0.65)
"""Heights, as parts of a tile."""


def page() -> Image.Image:
    """The page, always the same pixels."""
    canvas = Image.new("RGB", (COLUMNS * TILE_SIZE, ROWS * TILE_SIZE), PAPER)
    canvas.paste(_photograph(PHOTO_TILES * TILE_SIZE))
    pen = ImageDraw.Draw(canvas)
    font = load_font("DejaVuSans-Bold", size=GLYPH_FONT_PX)
    for index, digit in enumerate(HEADING):
        centre = ((index + 0.5) * TILE_SIZE, (PHOTO_TILES + 0.5) * TILE_SIZE)
        pen.text(centre, digit, fill=INK, font=font, anchor="mm")
    font = load_font("DejaVuSans", size=DENSE_FONT_PX)
    digits = np.random.default_rng(0).integers(0, 10, (2 * ROWS, 4))
    for (row, column), digit in np.ndenumerate(digits):
        centre = (PHOTO_TILES * TILE_SIZE + 16 * column + 8, 16 * row + 8)
        pen.text(centre, str(digit), fill=INK, font=font, anchor="mm")
    left, bottom = (COLUMNS - 1) * TILE_SIZE, TILE_SIZE - 3
    for index, height in enumerate(BARS):
        x = left + 4 + 9 * index
        pen.rectangle((x, bottom - height * (TILE_SIZE - 6), x + 5, bottom), fill=INK)
    return canvas


def _photograph(side: int) -> Image.Image:
    with Image.open(PHOTOGRAPH) as photo:
        square = photo.convert("RGB").crop((0, 0, photo.height, photo.height))
    return square.resize((side, side), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    picture, path = page(), parser.parse_args().out
    picture.save(path)
    print(f"{path}: {picture.width} x {picture.height} px, {COLUMNS * ROWS} tiles")
