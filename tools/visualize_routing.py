#!/usr/bin/env python3
"""Draws which tiles of images a trained router compresses, as Figures 3-5 of the ViCO paper.

    python tools/visualize_routing.py --load runs/demo/flash --output routing.png a.png b.jpg
    python tools/visualize_routing.py --load FLASH --layout 3x4 --output routing.png photo.jpg

The whole image is drawn in its own pixels. The thumbnail is routed too, but not drawn: it shows the
whole image once more.
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tyro.conf import Positional

from megatron_vico import cpu_stand_in
from megatron_vico.cli.command_line import read
from megatron_vico.cli.engine_flags import RoutingFlags
from megatron_vico.errors import USER_ERRORS, ConfigError, SampleError


@dataclass(frozen=True, kw_only=True)
class Flags(RoutingFlags):
    """Draw which tiles of images a trained router compresses."""

    images: Positional[tuple[Path, ...]]
    """Image files."""

    output: Path
    """Picture to write."""

    tile_px: int | None = None
    """Longer side of a tile in the picture; unset, the pixels that it has, but 112 or more."""

    layout: str | None = None
    """Rows x columns of tiles, such as 3x3 or 3x4: the middle of each image that has this shape is
    shown to the router. Unset, each image's own layout."""

    columns: int = 4
    """Images in a row of the picture."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: if there is nothing to draw."""
        super().__post_init__()
        if not self.images:
            raise ConfigError("no image to draw; name image files.")


def main() -> int:
    """Parse, route, draw; exit status 0, or 2 after an error of the user's."""
    cpu_stand_in.install()  # before megatron is imported, which `draw` does
    try:
        draw(read(Flags, sys.argv[1:], prog="visualize_routing.py"))
    except USER_ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def draw(options: Flags) -> None:
    """Do what `main` says."""
    from megatron_vico.data.encode.tiling import choose_grid
    from megatron_vico.data.samples import ConversationSample, Turn
    from megatron_vico.evaluation.overlays import RoutedImage, routing_picture

    prompts, shown, routing = [], [], options.routing()
    with options.engine() as engine:
        size, limit = engine.model.vision.image_size, options.use.max_dynamic_patch
        for path in options.images:
            picture = seen = _read(path)
            if options.layout is not None:
                grid = _grid(options.layout)
                picture = _middle(picture, grid)
                seen = picture.resize((grid[0] * size, grid[1] * size), Image.Resampling.BICUBIC)
            columns, rows = choose_grid(*seen.size, image_size=size, max_dynamic_patch=limit)
            if options.layout is not None and (columns, rows) != grid:
                raise ConfigError(
                    f"--layout {options.layout}: {grid[0] * grid[1]} tiles, but the images are cut"
                    f" into at most {limit}; give --max-dynamic-patch {grid[0] * grid[1]}."
                )
            content = io.BytesIO()
            seen.save(content, "PNG")
            turns = (Turn("human", "<image>"),)  # the router does not see the text
            sample = ConversationSample(key=str(path), turns=turns, images=(content.getvalue(),))
            prompts.append(engine.prompt(sample))
            shown.append((picture, columns, columns * rows))
        routed = engine.route(prompts, routing)
        tokens = (engine.model.visual_tokens_per_tile, engine.model.compressed_tokens_per_tile)
    pictures = []
    for path, (picture, columns, count), (compressed_N, probability_N) in zip(
        options.images, shown, routed, strict=True
    ):
        title = f"{path.name}: {int(compressed_N.sum())} of {len(compressed_N)} tiles compressed"
        print(title)
        pictures.append(
            RoutedImage(
                picture=picture,
                columns=columns,
                compressed=compressed_N[:count].tolist(),
                probability=probability_N[:count].tolist(),
                title=title if options.layout else "",
            )
        )
    drawn = routing_picture(
        pictures, tokens=tokens, tile_px=options.tile_px, columns=options.columns
    )
    drawn.save(options.output)


def _read(path: Path) -> Image.Image:
    from megatron_vico.data.encode.tiling import decode_image

    try:
        content = path.read_bytes()
    except OSError as error:
        raise SampleError(
            f"{path}: {error.strerror}; give image files that can be read."
        ) from error
    return decode_image(content, key=str(path), number=0)


def _grid(layout: str) -> tuple[int, int]:
    """Columns and rows."""
    rows, times, columns = layout.partition("x")
    if not (times and rows.isdecimal() and columns.isdecimal() and int(rows) * int(columns)):
        raise ConfigError(f"--layout {layout}: expected rows x columns, such as 3x4.")
    return int(columns), int(rows)


def _middle(picture: Image.Image, grid: tuple[int, int]) -> Image.Image:
    """The largest part around the middle that has the grid's shape: its tiles are square."""
    side = min(picture.width / grid[0], picture.height / grid[1])
    width, height = round(side * grid[0]), round(side * grid[1])
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


if __name__ == "__main__":
    sys.exit(main())
