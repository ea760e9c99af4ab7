"""`vico shards make | index | inspect | verify`: shards made, indexed again, looked at, checked."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, create_mutex_group

from megatron_vico.cli.command_line import read_action
from megatron_vico.cli.shard_checks import Inspect, Verify
from megatron_vico.config.config_json import model_named
from megatron_vico.config.schema import TilingOptions
from megatron_vico.errors import ConfigError
from megatron_vico.shard_tools.options import WriterOptions, usable_cpus

NUM_LISTED = 20
"""Samples left out that are printed."""

_SOURCE = create_mutex_group(required=True)


def main(arguments: Sequence[str]) -> int:
    """Parse and run; returns the exit status."""
    actions = {"make": Make, "index": Index, "inspect": Inspect, "verify": Verify}
    action = read_action(actions, arguments, prog="vico shards", description=__doc__)
    return action.run() or 0


@dataclass(frozen=True, kw_only=True)
class _Encoding(TilingOptions):
    """What tokens and tiles are counted with."""

    tokenizer_model: str
    """Tokenizer folder, or SentencePiece .model."""

    model_size: str
    """Gives the side of a tile: a preset's name, or the path of a config.json."""

    workers: int = field(default_factory=usable_cpus)
    """Processes; unset, one a CPU."""

    def encoding(self) -> dict[str, Any]:
        """Tokenizer and settings, as the functions that make shards take them."""
        from megatron_vico.data.encode.sample_encoder import EncodingSettings
        from megatron_vico.data.encode.tokenizer import load_tokenizer

        model = model_named(self.model_size)
        tokenizer = load_tokenizer(self.tokenizer_model)
        tokenizer.check_fits(model)
        settings = EncodingSettings.from_options(self, image_size=model.vision.image_size)
        return {"tokenizer": tokenizer, "settings": settings}


@dataclass(frozen=True, kw_only=True)
class Index(_Encoding):
    """Count tokens and tiles again; the tar files stay as they are."""

    folder: Positional[Path]
    """A folder of tar files, made here or by any WebDataset writer."""

    def run(self) -> None:
        """Write the index and say what is in it."""
        from megatron_vico.shard_tools.reindex import index_shards

        counting: dict[str, Any] = {"num_workers": self.workers, "show_progress": True}
        index_shards(self.folder, **self.encoding(), **counting)
        _report(self.folder)


@dataclass(frozen=True, kw_only=True)
class Make(_Encoding):
    """Write data sets as shards; given again, go on where it was interrupted."""

    jsonl: Annotated[Path | None, _SOURCE] = None
    """One sample a line, in the official chat format."""

    meta: Annotated[Path | None, _SOURCE] = None
    """The official meta JSON: every data set becomes a folder of --out."""

    image_root: Path | None = None
    """Folder or .tar that paths in --jsonl start from; unset, the JSONL's folder."""

    out: Path
    """Folder to make."""

    writing: WriterOptions

    def run(self) -> None:
        """Write the shards and say what is in them."""
        from megatron_vico.data.shards.mixture import MIXTURE_NAME
        from megatron_vico.shard_tools.writer import make_mixture, make_shards

        tokens_kept = model_named(self.model_size).visual_tokens_per_tile
        options = replace(self.writing, num_workers=self.workers, tokens_kept=tokens_kept)
        how = {**self.encoding(), "options": options, "out_dir": self.out}
        if self.jsonl is not None:
            root = self.image_root or self.jsonl.parent
            make_shards(self.jsonl, image_root=root, **how)
            _report(self.out)
            return
        if self.image_root is not None:
            raise ConfigError(
                "--image-root has no effect with --meta, which gives each data set its own root;"
                " remove it."
            )
        assert self.meta is not None, "tyro takes one of the two"
        for folder in make_mixture(self.meta, **how):
            _report(folder.path)
            if folder.warning:
                print(f"warning: {folder.warning}")
        print(f"train on all of them with --data-path {self.out / MIXTURE_NAME}")


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
