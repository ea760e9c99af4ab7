"""Tiles of the demo's images: dense digits, one glyph, a crop of a photo, a bar chart, a blank.

A tile is 32 px square. The toy's vision tower cuts it into 16 patches, which become 4 visual
tokens, or 1 when the tile is compressed. Four digits fill a tile so that each uncompressed token
sees one of them, and one compressed token would have to carry all four; every other kind fits into
one token. That is what the router has to find out.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import skimage
import sklearn
from PIL import Image, ImageDraw, ImageFont

TILE_SIZE = 32
SPLITS = ("train", "val", "test")
KINDS = ("dense", "glyph", "photo", "chart", "blank")

FONT_FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
# Faces whose digits a person still tells apart at 14 px; the slanted ones are for big glyphs only.
DENSE_FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSans-Oblique",
)
GLYPH_FACES = (
    *DENSE_FACES,
    "DejaVuSans-BoldOblique",
    "DejaVuSerif-Italic",
    "DejaVuSansMono-Oblique",
)
DENSE_FONT_PX = 14
GLYPH_FONT_PX = 24

PHOTO_FOLDER = Path(skimage.__file__).parent / "data"
PHOTOS: dict[str, tuple[Path, ...]] = {
    "cat": (PHOTO_FOLDER / "chelsea.png",),
    "rocket": (PHOTO_FOLDER / "rocket.jpg",),
    "stars": (PHOTO_FOLDER / "hubble_deep_field.jpg",),
    "eye": (PHOTO_FOLDER / "retina.jpg",),
    "bike": (PHOTO_FOLDER / "motorcycle_left.png",),
    "brick": (PHOTO_FOLDER / "brick.png",),
    "stones": (PHOTO_FOLDER / "gravel.png",),
    "flower": (Path(sklearn.__file__).parent / "datasets" / "images" / "flower.jpg",),
    "page": (PHOTO_FOLDER / "page.png", PHOTO_FOLDER / "text.png"),
}
PHOTO_SIDE_PX = 240
CELL_PX = 48
CELL_MIN_STD = 8.0

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One tile with its kind and the answer to the question about it."""

    pixels: Pixels
    """[32, 32, 3] uint8, RGB."""
    kind: str
    answer: str


def photo_cells() -> dict[str, dict[str, list[Pixels]]]:
    """Cut photos into cells of 48 px and give each to one split: no two splits share a pixel.

    The assignment does not depend on the demo's seed: held-out cells stay held out whatever the
    seed. Cells with hardly any contrast (night sky, blank paper, the black around the retina) are
    left out, since nothing in them tells one photo from another, or from a blank tile.

    Returns:
        split -> photo class -> cells, each [48, 48, 3] uint8.
    """
    rng = np.random.default_rng(0)
    cells: dict[str, dict[str, list[Pixels]]] = {split: {} for split in SPLITS}
    for name, paths in PHOTOS.items():
        found = [cell for path in paths for cell in _cut(path, shrink=name != "page")]
        order = rng.permutation(len(found))
        num_held_out = max(2, round(len(found) * 2 / 15))
        bounds = {
            "test": order[:num_held_out],
            "val": order[num_held_out : 2 * num_held_out],
            "train": order[2 * num_held_out :],
        }
        for split in SPLITS:
            cells[split][name] = [found[i] for i in sorted(bounds[split])]
    return cells


def _cut(path: Path, *, shrink: bool) -> list[Pixels]:
    image = Image.open(path).convert("RGB")
    if shrink:
        # At 240 px a 32-px crop still shows something of the object; page scans keep their size,
        # else text is mush.
        scale = PHOTO_SIDE_PX / min(image.size)
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
        )
    pixels = np.asarray(image)
    corners = [
        (y, x)
        for y in range(0, pixels.shape[0] - CELL_PX + 1, CELL_PX)
        for x in range(0, pixels.shape[1] - CELL_PX + 1, CELL_PX)
    ]
    cells = [pixels[y : y + CELL_PX, x : x + CELL_PX] for y, x in corners]
    return [cell for cell in cells if cell.mean(axis=2).std() >= CELL_MIN_STD]


class TileMaker:
    """Draws tiles of one split from one random stream."""

    def __init__(self, cells: dict[str, list[Pixels]], *, rng: np.random.Generator) -> None:
        """Load the fonts.

        Args:
            cells: photo class -> cells of this split, as from `photo_cells`.
            rng: the split's own stream; the same stream gives the same tiles.
        """
        self._cells = cells
        self._rng = rng
        self._dense_fonts = [load_font(face, size=DENSE_FONT_PX) for face in DENSE_FACES]
        self._glyph_fonts = [load_font(face, size=GLYPH_FONT_PX) for face in GLYPH_FACES]

    def make(self, kind: str) -> Tile:
        """Draw one tile; `kind` is one of KINDS."""
        draw = {
            "dense": self._dense,
            "glyph": self._glyph,
            "photo": self._photo,
            "chart": self._chart,
            "blank": self._blank,
        }[kind]
        pixels, answer = draw()
        return Tile(pixels=pixels, kind=kind, answer=answer)

    def _colours(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Paper and ink, far apart in lightness; one in five is light on dark."""
        light = tuple(int(v) for v in self._rng.integers(190, 256, 3))
        dark = tuple(int(v) for v in self._rng.integers(0, 71, 3))
        paper, ink = (dark, light) if self._rng.random() < 0.2 else (light, dark)
        return (paper[0], paper[1], paper[2]), (ink[0], ink[1], ink[2])

    def _dense(self) -> tuple[Pixels, str]:
        paper, ink = self._colours()
        canvas = Image.new("RGB", (TILE_SIZE, TILE_SIZE), paper)
        pen = ImageDraw.Draw(canvas)
        font = self._dense_fonts[self._rng.integers(len(self._dense_fonts))]
        digits = self._rng.integers(0, 10, 4)
        jitter = self._rng.uniform(-1.5, 1.5, (4, 2))
        for i, digit in enumerate(digits):
            centre = (8 + 16 * (i % 2) + jitter[i, 0], 8 + 16 * (i // 2) + jitter[i, 1])
            pen.text(centre, str(digit), fill=ink, font=font, anchor="mm")
        return np.asarray(canvas), "".join(str(digit) for digit in digits)

    def _glyph(self) -> tuple[Pixels, str]:
        paper, ink = self._colours()
        canvas = Image.new("RGB", (TILE_SIZE, TILE_SIZE), paper)
        font = self._glyph_fonts[self._rng.integers(len(self._glyph_fonts))]
        digit = str(self._rng.integers(0, 10))
        centre = (16 + self._rng.uniform(-2.5, 2.5), 16 + self._rng.uniform(-2, 2))
        ImageDraw.Draw(canvas).text(centre, digit, fill=ink, font=font, anchor="mm")
        return np.asarray(canvas), digit

    def _photo(self) -> tuple[Pixels, str]:
        names = list(self._cells)
        name = names[self._rng.integers(len(names))]
        cell = self._cells[name][self._rng.integers(len(self._cells[name]))]
        y, x = self._rng.integers(0, CELL_PX - TILE_SIZE + 1, 2)
        crop = cell[y : y + TILE_SIZE, x : x + TILE_SIZE].astype(np.float32)
        if name != "page" and self._rng.random() < 0.5:
            crop = crop[:, ::-1]
        crop = crop * self._rng.uniform(0.9, 1.1)
        return np.clip(crop, 0, 255).astype(np.uint8), name

    def _chart(self) -> tuple[Pixels, str]:
        paper, _ = self._colours()
        canvas = Image.new("RGB", (TILE_SIZE, TILE_SIZE), paper)
        pen = ImageDraw.Draw(canvas)
        num_bars = int(self._rng.integers(2, 5))
        slot = (TILE_SIZE - 4) / num_bars
        base = 255 if sum(paper) < 3 * 128 else 0
        ink = tuple(int(abs(base - v)) for v in self._rng.integers(0, 120, 3))
        for i in range(num_bars):
            left = 2 + i * slot + slot * 0.2
            top = self._rng.uniform(4, 20)
            pen.rectangle(
                (left, top, left + slot * 0.6, TILE_SIZE - 3), fill=(ink[0], ink[1], ink[2])
            )
        return np.asarray(canvas), f"{num_bars} bars"

    def _blank(self) -> tuple[Pixels, str]:
        top, bottom = self._rng.uniform(0, 255, 3), self._rng.uniform(0, 255, 3)
        if self._rng.random() < 0.5:
            bottom = top
        ramp = np.linspace(0, 1, TILE_SIZE)[:, None, None]
        pixels = (
            top * (1 - ramp) + bottom * ramp + self._rng.normal(0, 4, (TILE_SIZE, TILE_SIZE, 3))
        )
        return np.clip(pixels, 0, 255).astype(np.uint8), "blank"


def load_font(face: str, *, size: int) -> ImageFont.FreeTypeFont:
    """A face of FONT_FOLDER, `size` px high."""
    # The basic layout engine gives the same pixels whether or not libraqm is installed.
    return ImageFont.truetype(
        FONT_FOLDER / f"{face}.ttf", size, layout_engine=ImageFont.Layout.BASIC
    )
