"""`vico shards make | index | inspect | verify`: shards made, indexed again, looked at, checked."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_vico.cli import shard_checks
from megatron_vico.config.config_json import model_named
from megatron_vico.config.schema import DataOptions
from megatron_vico.errors import ConfigError
from megatron_vico.shard_tools.options import WriterOptions, usable_cpus

NUM_LISTED = 20
"""Samples left out that are printed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vico shards", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    make_help = "write data sets as shards; given again, go on where it was interrupted"
    make = actions.add_parser("make", help=make_help)
    _add_make(make)
    index_help = "count tokens and tiles again; the tar files stay as they are"
    index = actions.add_parser("index", help=index_help)
    index.add_argument("folder", type=Path)
    workers_help = "processes (default: one a CPU)"
    for command in (make, index):
        _add_settings(command)
        command.add_argument(
            "--workers", type=int, default=usable_cpus(), dest="num_workers", help=workers_help
        )
    inspect = actions.add_parser("inspect", help="show samples and statistics")
    shard_checks.add_inspect_arguments(inspect)
    verify = actions.add_parser("verify", help="read everything once and say what is wrong")
    shard_checks.add_verify_arguments(verify)
    options = parser.parse_args(arguments)
    if options.action == "verify":
        return shard_checks.verify(options)
    {"make": _make, "index": _index, "inspect": shard_checks.inspect}[options.action](options)
    return 0


def _add_make(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--jsonl", type=Path, help="one sample a line, in the official chat format")
    meta_help = "the official meta JSON: every data set becomes a folder of --out"
    source.add_argument("--meta", type=Path, help=meta_help)
    root_help = "folder or .tar that paths in --jsonl start from; unset, the JSONL's folder"
    parser.add_argument("--image-root", type=Path, help=root_help)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    for each in fields(WriterOptions):
        if "help" in each.metadata:
            flag, default = "--" + each.name.replace("_", "-"), each.default
            kind, text = type(default), each.metadata["help"]
            parser.add_argument(flag, type=kind, default=default, help=text)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    defaults = DataOptions()
    tokenizer_help = "tokenizer folder, or SentencePiece .model"
    parser.add_argument("--tokenizer-model", required=True, help=tokenizer_help)
    size_help = "gives the side of a tile: a preset's name, or the path of a config.json"
    parser.add_argument("--model-size", required=True, help=size_help)
    tiles, thumbnail = defaults.max_dynamic_patch, defaults.use_thumbnail
    parser.add_argument("--max-dynamic-patch", type=int, default=tiles, help="most tiles an image")
    parser.add_argument("--use-thumbnail", action=argparse.BooleanOptionalAction, default=thumbnail)
    parser.add_argument("--tile-tags", choices=("none", "numbered"), default=defaults.tile_tags)


def _encoding(options: argparse.Namespace) -> dict[str, Any]:
    """Tokenizer and settings, as the functions that make shards take them."""
    from megatron_vico.data.encode.sample_encoder import EncodingSettings
    from megatron_vico.data.encode.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer_model)
    image_size = model_named(options.model_size).vision.image_size
    settings = EncodingSettings.from_options(options, image_size=image_size)
    return {"tokenizer": tokenizer, "settings": settings}


def _index(options: argparse.Namespace) -> None:
    from megatron_vico.shard_tools.reindex import index_shards

    counting = {"num_workers": options.num_workers, "show_progress": True}
    index_shards(options.folder, **_encoding(options), **counting)
    _report(options.folder)


def _make(options: argparse.Namespace) -> None:
    from megatron_vico.data.shards.mixture import MIXTURE_NAME
    from megatron_vico.shard_tools.writer import make_mixture, make_shards

    encoding = _encoding(options)
    given = vars(options)
    named = {each.name: given[each.name] for each in fields(WriterOptions) if each.name in given}
    how = {**encoding, "options": WriterOptions(**named), "out_dir": options.out}
    if options.meta is None:
        root = options.image_root or options.jsonl.parent
        make_shards(options.jsonl, image_root=root, **how)
        _report(options.out)
        return
    if options.image_root is not None:
        raise ConfigError(
            "--image-root has no effect with --meta, which gives each data set its own root;"
            " remove it."
        )
    for folder in make_mixture(options.meta, **how):
        _report(folder.path)
        if folder.warning:
            print(f"warning: {folder.warning}")
    print(f"train on all of them with --data-path {options.out / MIXTURE_NAME}")


def _report(folder: Path) -> None:
    from megatron_vico.data.shards.index import INDEX_NAME
    from megatron_vico.data.shards.reader import ShardFolder
    from megatron_vico.shard_tools.writer import table_of_causes

    shards = ShardFolder.open(folder)
    index, skipped = shards.index, shards.index.skipped
    for message in skipped[:NUM_LISTED]:
        print(f"left out: {message}")
    if len(skipped) > NUM_LISTED:
        print(f"... and {len(skipped) - NUM_LISTED} more, which {folder / INDEX_NAME} lists")
    num_shards = len(index.shards)
    print(f"{folder}: {index.num_samples} samples in {num_shards} shards, {len(skipped)} left out")
    if skipped:
        print(table_of_causes(skipped))
    num_bytes = sum(shard.num_bytes for shard in index.shards)
    tokens, tiles = shards.num_tokens.sum(), shards.num_tiles.sum()
    print(f"{num_bytes} bytes, {tokens} tokens (one a tile), {tiles} tiles")
