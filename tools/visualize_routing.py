#!/usr/bin/env python3
"""Draws which tiles of given images a trained router compresses, as in Figures 3-5 of the ViCO
paper.

python tools/visualize_routing.py --load runs/demo/flash --output routing.png a.png b.jpg
python tools/visualize_routing.py --load runs/demo/router --tokenizer-model
runs/demo/tokenizer/demo.model \
    --output routing.png --max-dynamic-patch 4 --no-use-thumbnail runs/demo/data/test/00000*.png

The thumbnail is routed too, but not drawn: it shows the whole image once more.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vico import cpu_stand_in
from megatron_vico.config.schema import DataOptions
from megatron_vico.errors import CheckpointError, ConfigError, SampleError

if TYPE_CHECKING:
    from megatron_vico.parallel.groups import Groups


def main() -> int:
    """Parse, route, draw.

    Returns:
        Exit status: 0, or 2 after an error of the user's.
    """
    defaults = DataOptions()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    parser.add_argument(
        "--load", type=Path, required=True, help="a run's folder, or an exported flash folder"
    )
    parser.add_argument("--output", type=Path, required=True, help="picture to write")
    parser.add_argument("--tokenizer-model", type=Path, help="unset, the one in --load")
    parser.add_argument(
        "--max-dynamic-patch",
        type=int,
        default=defaults.max_dynamic_patch,
        help="most tiles an image",
    )
    parser.add_argument(
        "--use-thumbnail", action=argparse.BooleanOptionalAction, default=defaults.use_thumbnail
    )
    parser.add_argument(
        "--granularity",
        choices=("tile", "image"),
        default="tile",
        help="what the router decides on",
    )
    parser.add_argument(
        "--rule",
        choices=("paper", "flash"),
        default="paper",
        help="p > 0.5, or the released models'",
    )
    parser.add_argument("--tile-px", type=int, default=112, help="side of a tile in the picture")
    parser.add_argument("--columns", type=int, default=4, help="images in a row of the picture")
    cpu_stand_in.install()  # before megatron is imported, which the functions below do
    try:
        from megatron_vico.config.schema import ParallelOptions
        from megatron_vico.parallel import groups as process_groups

        options = parser.parse_args()
        with process_groups.started(ParallelOptions(), seed=0, timeout_minutes=10) as groups:
            draw(options, groups=groups)
    except (CheckpointError, ConfigError, SampleError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def draw(options: argparse.Namespace, *, groups: "Groups") -> None:
    """Do what `main` says.

    Args:
        options: the parsed command line.
        groups: process groups of one rank.
    """
    from megatron_vico.data.encode.sample_encoder import EncodingSettings
    from megatron_vico.data.encode.tiling import choose_grid, decode_image
    from megatron_vico.data.encode.tokenizer import load_tokenizer
    from megatron_vico.data.samples import ConversationSample, Turn
    from megatron_vico.evaluation.plots import RoutedImage, routing_picture
    from megatron_vico.inference.engine import Routing
    from megatron_vico.inference.loading import build_engine, load_weights, model_of

    model = model_of(options.load)
    image_size = model.vision.image_size
    engine = build_engine(
        model,
        groups=groups,
        tokenizer=load_tokenizer(options.tokenizer_model or options.load),
        settings=EncodingSettings(
            image_size=image_size,
            max_dynamic_patch=options.max_dynamic_patch,
            use_thumbnail=options.use_thumbnail,
        ),
        batch_size=8,
    )
    load_weights(engine, options.load)
    prompts, grids = [], []
    for path in options.images:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise SampleError(
                f"{path}: {error.strerror}; give image files that can be read."
            ) from error
        size = decode_image(content, key=str(path), number=0).size
        grids.append(
            choose_grid(*size, image_size=image_size, max_dynamic_patch=options.max_dynamic_patch)
        )
        turns = (Turn("human", "<image>"),)  # the router does not see the text
        prompts.append(
            engine.prompt(ConversationSample(key=str(path), turns=turns, images=(content,)))
        )
    routed = engine.route(prompts, Routing(rule=options.rule, granularity=options.granularity))
    pictures = []
    for path, prompt, (columns, rows), (compressed_N, probability_N) in zip(
        options.images, prompts, grids, routed, strict=True
    ):
        shown = columns * rows
        print(f"{path}: {int(compressed_N.sum())} of {len(compressed_N)} tiles compressed")
        pictures.append(
            RoutedImage(
                tiles=prompt.first.tiles[:shown],
                columns=columns,
                compressed=compressed_N[:shown].tolist(),
                probability=probability_N[:shown].tolist(),
            )
        )
    routing_picture(pictures, tile_px=options.tile_px, columns=options.columns).save(options.output)


if __name__ == "__main__":
    sys.exit(main())
