#!/usr/bin/env python3
"""Draws which tiles of images a trained router compresses, as Figures 3-5 of the ViCO paper.

    python tools/visualize_routing.py --load runs/demo/flash --output routing.png a.png b.jpg
    python tools/visualize_routing.py --load runs/demo/router --output routing.png \\
        runs/demo/data/test/00000*.png

The thumbnail is routed too, but not drawn: it shows the whole image once more.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

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

    tile_px: int = 112
    """Side of a tile in the picture."""

    columns: int = 4
    """Images in a row of the picture."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: if there is nothing to draw."""
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
    from megatron_vico.data.encode.tiling import choose_grid, decode_image
    from megatron_vico.data.samples import ConversationSample, Turn
    from megatron_vico.evaluation.plots import RoutedImage, routing_picture

    prompts, grids, routing = [], [], options.routing()
    with options.engine() as engine:
        for path in options.images:
            try:
                content = path.read_bytes()
            except OSError as error:
                raise SampleError(
                    f"{path}: {error.strerror}; give image files that can be read."
                ) from error
            width, height = decode_image(content, key=str(path), number=0).size
            grids.append(
                choose_grid(
                    width,
                    height,
                    image_size=engine.model.vision.image_size,
                    max_dynamic_patch=options.use.max_dynamic_patch,
                )
            )
            turns = (Turn("human", "<image>"),)  # the router does not see the text
            sample = ConversationSample(key=str(path), turns=turns, images=(content,))
            prompts.append(engine.prompt(sample))
        routed = engine.route(prompts, routing)
    pictures = []
    for path, prompt, (columns, rows), (compressed_N, probability_N) in zip(
        options.images, prompts, grids, routed, strict=True
    ):
        shown = columns * rows
        print(f"{path}: {int(compressed_N.sum())} of {len(compressed_N)} tiles compressed")
        pictures.append(
            RoutedImage(
                tiles=prompt.parts[0].tiles[:shown],
                columns=columns,
                compressed=compressed_N[:shown].tolist(),
                probability=probability_N[:shown].tolist(),
            )
        )
    routing_picture(pictures, tile_px=options.tile_px, columns=options.columns).save(options.output)


if __name__ == "__main__":
    sys.exit(main())
