"""`vico shards make | index | inspect | verify`: shards from JSONL and images, a new index, a look,
a check."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_vico.cli import shard_checks
from megatron_vico.config.config_json import model_named
from megatron_vico.config.schema import DataOptions
from megatron_vico.data.encode.sample_encoder import EncodingSettings
from megatron_vico.data.encode.tokenizer import Tokenizer, load_tokenizer
from megatron_vico.data.shards.index import INDEX_NAME, FolderIndex
from megatron_vico.data.shards.mixture import MIXTURE_NAME
from megatron_vico.data.shards.reader import ShardFolder
from megatron_vico.errors import ConfigError
from megatron_vico.shard_tools.pool import usable_cpus
from megatron_vico.shard_tools.reindex import index_shards
from megatron_vico.shard_tools.sources import FrameOptions
from megatron_vico.shard_tools.writer import (
    WriterOptions,
    make_mixture,
    make_shards,
    table_of_causes,
)

NUM_LISTED = 20
"""Samples left out that are printed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their flags."""
    actions = parser.add_subparsers(dest="action", required=True)
    make = actions.add_parser(
        "make", help="write data sets as shards; given again, go on where it was interrupted"
    )
    _add_make(make)
    index = actions.add_parser(
        "index", help="count tokens and tiles anew; the tar files stay as they are"
    )
    index.add_argument("folder", type=Path)
    for command in (make, index):
        _add_settings(command)
        command.add_argument(
            "--workers", type=int, default=usable_cpus(), help="processes (default: one a CPU)"
        )
    shard_checks.add_inspect_arguments(
        actions.add_parser("inspect", help="show samples and statistics")
    )
    shard_checks.add_verify_arguments(
        actions.add_parser("verify", help="read everything once and say what is wrong")
    )


def run(options: argparse.Namespace) -> int:
    """Do what the parsed arguments ask for; returns the exit status."""
    if options.action == "inspect":
        shard_checks.inspect(options)
        return 0
    if options.action == "verify":
        return shard_checks.verify(options)
    tokenizer, settings = load_tokenizer(options.tokenizer_model), _settings(options)
    if options.action == "index":
        counting = {"num_workers": options.workers, "show_progress": True}
        _report(
            options.folder,
            index_shards(options.folder, tokenizer=tokenizer, settings=settings, **counting),
        )
        return 0
    _make(options, tokenizer=tokenizer, settings=settings)
    return 0


def _make(options: argparse.Namespace, *, tokenizer: Tokenizer, settings: EncodingSettings) -> None:
    frames = FrameOptions(
        seed=options.seed, min_num_frame=options.min_num_frame, max_num_frame=options.max_num_frame
    )
    writer = WriterOptions(
        samples_per_shard=options.samples_per_shard,
        max_shard_bytes=options.max_shard_bytes,
        max_skipped=options.max_skipped,
        max_skipped_share=options.max_skipped_share,
        frames=frames,
        num_workers=options.workers,
    )
    if options.meta is None:
        _report(
            options.out,
            make_shards(
                options.jsonl,
                image_root=options.image_root or options.jsonl.parent,
                out_dir=options.out,
                tokenizer=tokenizer,
                settings=settings,
                options=writer,
            ),
        )
        return
    if options.image_root is not None:
        raise ConfigError(
            "--image-root has no effect with --meta, which gives each data set its own root;"
            " remove it."
        )
    folders = make_mixture(
        options.meta, out_dir=options.out, tokenizer=tokenizer, settings=settings, options=writer
    )
    for folder in folders:
        _report(folder.path, folder.index)
        if folder.warning:
            print(f"warning: {folder.warning}")
    print(f"train on all of them with --data-path {options.out / MIXTURE_NAME}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vico shards", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def _add_make(parser: argparse.ArgumentParser) -> None:
    defaults, frames = WriterOptions(), FrameOptions()
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--jsonl", type=Path, help="one sample a line, in the official chat format")
    source.add_argument(
        "--meta", type=Path, help="the official meta JSON: every data set becomes a folder of --out"
    )
    parser.add_argument(
        "--image-root",
        type=Path,
        help="folder or .tar that paths in --jsonl start from; unset, the JSONL's folder",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--samples-per-shard",
        type=int,
        default=defaults.samples_per_shard,
        help=(
            "lines that become a shard; the unit of work, so give fewer if there are more workers"
            " than shards"
        ),
    )
    parser.add_argument(
        "--max-shard-bytes",
        type=int,
        default=defaults.max_shard_bytes,
        help="where a shard goes on in another file",
    )
    parser.add_argument(
        "--max-skipped", type=int, default=defaults.max_skipped, help="broken samples to leave out"
    )
    parser.add_argument(
        "--max-skipped-share",
        type=float,
        default=defaults.max_skipped_share,
        help="the same as a share of all samples, such as 0.01; the larger limit holds",
    )
    parser.add_argument(
        "--seed", type=int, default=frames.seed, help="of the frames that are taken from videos"
    )
    parser.add_argument(
        "--min-num-frame", type=int, default=frames.min_num_frame, help="fewest frames of a video"
    )
    parser.add_argument(
        "--max-num-frame", type=int, default=frames.max_num_frame, help="most frames of a video"
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    defaults = DataOptions()
    parser.add_argument(
        "--tokenizer-model", required=True, help="tokenizer folder, or SentencePiece .model"
    )
    parser.add_argument(
        "--model-size", required=True, help="gives the side of a tile; a name of config/registry.py"
    )
    parser.add_argument(
        "--max-dynamic-patch",
        type=int,
        default=defaults.max_dynamic_patch,
        help="most tiles an image",
    )
    parser.add_argument(
        "--use-thumbnail", action=argparse.BooleanOptionalAction, default=defaults.use_thumbnail
    )
    parser.add_argument("--tile-tags", choices=("none", "numbered"), default=defaults.tile_tags)


def _settings(options: argparse.Namespace) -> EncodingSettings:
    image_size = model_named(options.model_size).vision.image_size
    return EncodingSettings.from_options(options, image_size=image_size)


def _report(folder: Path, index: FolderIndex) -> None:
    for message in index.skipped[:NUM_LISTED]:
        print(f"left out: {message}")
    if len(index.skipped) > NUM_LISTED:
        print(f"... and {len(index.skipped) - NUM_LISTED} more, which {folder / INDEX_NAME} lists")
    print(
        f"{folder}: {index.num_samples} samples in {len(index.shards)} shards, {len(index.skipped)}"
        " left out"
    )
    if index.skipped:
        print(table_of_causes(index.skipped))
    shards = ShardFolder.open(folder)
    num_bytes = sum(shard.num_bytes for shard in index.shards)
    print(
        f"{num_bytes} bytes, {shards.num_tokens.sum()} tokens (one a tile),"
        f" {shards.num_tiles.sum()} tiles"
    )
