"""`vico shards make | index | inspect | verify`: shards from JSONL and images, a new index, a look, a check."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_vico.cli import shard_checks
from megatron_vico.config.schema import DataOptions
from megatron_vico.data.encoding import EncodingSettings
from megatron_vico.data.shard_index import FolderIndex
from megatron_vico.data.shard_writer import WriterOptions, index_shards, make_shards
from megatron_vico.data.tokenizer import load_tokenizer
from megatron_vico.models.registry import get_model_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their flags."""
    actions = parser.add_subparsers(dest="action", required=True)
    make = actions.add_parser("make", help="write a JSONL file and its images as shards")
    make.add_argument("--jsonl", type=Path, required=True, help="one sample a line, in the official chat format")
    make.add_argument("--image-root", type=Path, help="folder that image paths start from; unset, the JSONL's own")
    make.add_argument("--out", type=Path, required=True, help="folder to make")
    defaults = WriterOptions()
    make.add_argument("--samples-per-shard", type=int, default=defaults.samples_per_shard)
    make.add_argument("--max-skipped", type=int, default=defaults.max_skipped, help="broken samples to leave out")
    index = actions.add_parser("index", help="count tokens and tiles anew; the tar files stay as they are")
    index.add_argument("folder", type=Path)
    for command in (make, index):
        _add_settings(command)
    shard_checks.add_inspect_arguments(actions.add_parser("inspect", help="show samples and statistics"))
    shard_checks.add_verify_arguments(actions.add_parser("verify", help="read everything once and say what is wrong"))


def run(options: argparse.Namespace) -> int:
    """Do what the parsed arguments ask for; returns the exit status."""
    if options.action == "inspect":
        shard_checks.inspect(options)
        return 0
    if options.action == "verify":
        return shard_checks.verify(options)
    tokenizer, settings = load_tokenizer(options.tokenizer_model), _settings(options)
    if options.action == "index":
        _report(options.folder, index_shards(options.folder, tokenizer=tokenizer, settings=settings))
        return 0
    index = make_shards(
        options.jsonl,
        image_root=options.image_root or options.jsonl.parent,
        out_dir=options.out,
        tokenizer=tokenizer,
        settings=settings,
        options=WriterOptions(samples_per_shard=options.samples_per_shard, max_skipped=options.max_skipped),
    )
    _report(options.out, index)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vico shards", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def _add_settings(parser: argparse.ArgumentParser) -> None:
    defaults = DataOptions()
    parser.add_argument("--tokenizer-model", required=True, help="tokenizer folder, or SentencePiece .model")
    parser.add_argument("--model-size", required=True, help="gives the side of a tile; a name of models/registry.py")
    parser.add_argument("--max-dynamic-patch", type=int, default=defaults.max_dynamic_patch, help="most tiles an image")
    parser.add_argument("--use-thumbnail", action=argparse.BooleanOptionalAction, default=defaults.use_thumbnail)
    parser.add_argument("--tile-tags", choices=("none", "numbered"), default=defaults.tile_tags)


def _settings(options: argparse.Namespace) -> EncodingSettings:
    return EncodingSettings(
        image_size=get_model_config(options.model_size).vision.image_size,
        max_dynamic_patch=options.max_dynamic_patch,
        use_thumbnail=options.use_thumbnail,
        tile_tags=options.tile_tags,
    )


def _report(folder: Path | str, index: FolderIndex) -> None:
    for message in index.skipped:
        print(f"left out: {message}")
    print(f"{folder}: {index.num_samples} samples in {len(index.shards)} shards, {len(index.skipped)} left out")
