"""Pictures: which tiles the router compresses (Figures 3-5 of the ViCO paper), and the losses of training."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

_GREY = (128, 128, 128)
_SHADE = 0.62
_GAP_PX = 2
_MARGIN_PX = 12


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedImage:
    """An image's tiles and what the router decided about each."""

    tiles: npt.NDArray[np.uint8]
    """[N, 3, S, S] RGB, row by row, without the thumbnail."""

    columns: int
    """Tiles in a row of the image; divides N."""

    compressed: Sequence[bool]
    """[N], True where the tile is compressed."""

    probability: Sequence[float]
    """[N], p_compress in [0, 1], printed on the tile."""


def routing_picture(images: Sequence[RoutedImage], *, tile_px: int = 112, columns: int = 4) -> Image.Image:
    """Images side by side, compressed tiles shaded grey, the router's p_compress printed on each tile.

    Args:
        images: what to show, in reading order.
        tile_px: side of a tile in the picture; pixels of small tiles are repeated, not blurred.
        columns: images in a row of the picture.

    Returns:
        The picture, RGB, with a line below that says how to read it.
    """
    drawn = [_draw_image(image, tile_px=tile_px) for image in images]
    columns = min(columns, len(drawn))
    cell_width = max(picture.width for picture in drawn) + _MARGIN_PX
    cell_height = max(picture.height for picture in drawn) + _MARGIN_PX
    rows = math.ceil(len(drawn) / columns)
    font = _font(max(14, tile_px // 8))
    caption = "grey: compressed tile; number: the router's p_compress"
    caption_height = int(font.getbbox(caption)[3]) + _MARGIN_PX
    size = (columns * cell_width + _MARGIN_PX, rows * cell_height + _MARGIN_PX + caption_height)
    canvas = Image.new("RGB", size, "white")
    for index, picture in enumerate(drawn):
        corner = (_MARGIN_PX + index % columns * cell_width, _MARGIN_PX + index // columns * cell_height)
        canvas.paste(picture, corner)
    ImageDraw.Draw(canvas).text((_MARGIN_PX, rows * cell_height + _MARGIN_PX), caption, fill="black", font=font)
    return canvas


def _draw_image(image: RoutedImage, *, tile_px: int) -> Image.Image:
    rows = len(image.tiles) // image.columns
    pitch = tile_px + _GAP_PX
    canvas = Image.new("RGB", (image.columns * pitch - _GAP_PX, rows * pitch - _GAP_PX), "white")
    pen = ImageDraw.Draw(canvas)
    font = _font(max(10, tile_px // 9))
    for index, (tile, compressed, probability) in enumerate(
        zip(image.tiles, image.compressed, image.probability, strict=True)
    ):
        left, top = index % image.columns * pitch, index // image.columns * pitch
        pixels = Image.fromarray(np.ascontiguousarray(tile.transpose(1, 2, 0)))
        how = Image.Resampling.NEAREST if pixels.width < tile_px else Image.Resampling.LANCZOS
        pixels = pixels.resize((tile_px, tile_px), how)
        if compressed:
            pixels = Image.blend(pixels, Image.new("RGB", pixels.size, _GREY), _SHADE)
        canvas.paste(pixels, (left, top))
        text = f"{probability:.2f}"
        # Half way down the left edge the label hides least of a tile with something in its corners or its middle; it
        # has a ground of its own since no colour of text can be read on every photo.
        place = (left + 3, top + tile_px // 2)
        box = pen.textbbox(place, text, font=font, anchor="lm")
        pen.rectangle((left, box[1] - 2, box[2] + 2, box[3] + 2), fill="black" if compressed else "white")
        pen.text(place, text, font=font, anchor="lm", fill="white" if compressed else "black")
    return canvas


def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)


def read_metrics(path: Path) -> dict[str, npt.NDArray[np.float64]]:
    """Columns of a metrics.jsonl file; half a last line of a run that was killed is left out.

    Args:
        path: one JSON object a line.

    Returns:
        Every numeric key -> its values in order; NaN in lines that lack the key.
    """
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    keys = {key for line in lines for key, value in line.items() if isinstance(value, int | float)}
    return {key: np.array([line.get(key, math.nan) for line in lines], dtype=np.float64) for key in sorted(keys)}


def loss_curves(metrics_files: Mapping[str, Path], *, columns: int = 3) -> Figure:
    """The loss of each stage over its steps, one panel a stage: every step in light, a running mean in dark.

    Args:
        metrics_files: stage's title -> its metrics.jsonl; a file without losses leaves its panel empty.
        columns: panels in a row.

    Returns:
        A figure to save.
    """
    columns = min(columns, len(metrics_files))
    rows = math.ceil(len(metrics_files) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows), layout="constrained")
    panels: list[Axes] = list(np.atleast_1d(figure.subplots(rows, columns)).flat)
    for panel, (title, path) in zip(panels, metrics_files.items(), strict=False):
        _draw_loss(panel, read_metrics(path), title=title)
    for panel in panels[len(metrics_files) :]:
        panel.set_axis_off()
    return figure


def _draw_loss(panel: Axes, metrics: Mapping[str, npt.NDArray[np.float64]], *, title: str) -> None:
    panel.set_title(title)
    panel.set_xlabel("step")
    panel.set_ylabel("loss")
    panel.grid(alpha=0.3)
    if "loss" not in metrics:
        panel.text(0.5, 0.5, "no losses", ha="center", va="center", transform=panel.transAxes)
        return
    loss = metrics["loss"]
    steps = metrics.get("iteration", np.arange(1.0, len(loss) + 1))
    if (loss > 0).all():
        panel.set_yscale("log")
    panel.plot(steps, loss, color="tab:blue", alpha=0.3, linewidth=0.8)
    window = max(1, len(loss) // 20)
    smooth = np.convolve(loss, np.full(window, 1 / window), mode="valid")
    panel.plot(steps[window - 1 :], smooth, color="tab:blue", linewidth=1.6)
    panel.text(0.97, 0.95, f"end: {smooth[-1]:.3g}", ha="right", va="top", transform=panel.transAxes)
