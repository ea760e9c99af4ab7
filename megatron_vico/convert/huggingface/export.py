"""Writes a Hugging Face folder: the weights file by file, and what belongs beside them."""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_vico import files
from megatron_vico.checkpoint.ranks import Ranks
from megatron_vico.config.registry import ModelConfig
from megatron_vico.convert.huggingface import safetensors_folder
from megatron_vico.convert.huggingface.config import (
    ExportOptions,
    Json,
    generation_json,
    model_json,
    options_of,
    preprocessor_json,
)
from megatron_vico.convert.huggingface.safetensors_folder import Group, Shard
from megatron_vico.convert.names.internvl import entries
from megatron_vico.convert.options import MAX_SHARD_BYTES, Layout
from megatron_vico.convert.remote_code_files import write_remote_code
from megatron_vico.convert.source import Source, TensorInfo, dtype_name
from megatron_vico.data.encode.tokenizer import Tokenizer
from megatron_vico.errors import CheckpointError, listed

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "sentencepiece.model"),
    *("chat_template.jinja", "chat_template.json"),
)

_GENERATION = "generation_config.json"
_PREPROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_CARRIED_CONFIG = "source_config.json"


def shards_of(
    source: Source, layout: Layout, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Shard]:
    """The files that a model's weights make, as yet unwritten.

    Args:
        source: of every tensor that the layout holds; what it has more is left out.
        layout: of the files.
        max_shard_bytes: size above which a new file begins.

    Raises:
        CheckpointError: if the source lacks a tensor of the layout.
    """
    rows = [row for row in entries(source.model, layout=layout).values() if row.files]
    absent = {row.megatron for row in rows} - source.tensors.keys()
    if absent:
        raise CheckpointError(
            f"{source.where}, to be written in the {layout} layout: missing tensors:"
            f" {listed(absent)}."
        )
    groups: list[Group] = [
        {
            name: TensorInfo(shape=shape, dtype=source.tensors[row.megatron].dtype)
            for name, shape in zip(row.files, row.file_shapes, strict=True)
        }
        for row in rows
    ]
    return safetensors_folder.plan_shards(groups, max_shard_bytes=max_shard_bytes)


def write_weights(
    folder: Path,
    source: Source,
    *,
    layout: Layout,
    shards: list[Shard],
    ranks: Ranks,
    written: Callable[[int], object],
) -> None:
    """Write the files of `shards_of` and their index; called by every rank, which share the files.

    Args:
        folder: an existing folder.
        source: what the shards were planned for.
        layout: of the files.
        shards: all of them.
        ranks: they share the files.
        written: called with the bytes that this rank has written, tensor by tensor.

    Raises:
        CheckpointError: on all ranks, if one could not read.
        OSError: on all ranks, if one could not write.
    """
    rows = {row.files: row for row in entries(source.model, layout=layout).values() if row.files}

    def make(group: Group) -> tuple[Tensor, ...]:
        row = rows[tuple(group)]
        return row.kind.to_hf(source.read_tensor(row.megatron))

    def write() -> None:
        for index in ranks.share([shard.num_bytes for shard in shards]):
            safetensors_folder.write_shard(folder, shards[index], make=make, written=written)

    ranks.agree(write)
    ranks.on_main(lambda: safetensors_folder.write_index(folder, shards))


def write_companions(
    folder: Path,
    *,
    model: ModelConfig,
    layout: Layout,
    dtype: torch.dtype,
    options: ExportOptions | None,
    tokenizer: Tokenizer | None = None,
    carried_from: Path | None = None,
) -> None:
    """Write what belongs beside the weights: the JSON files and the tokenizer.

    Args:
        folder: of the weights.
        model: the size.
        layout: of the weights.
        dtype: their format.
        options: what the config files say; unset, what the source's said.
        tokenizer: written beside the weights; unset, the source's files travel along as they are.
        carried_from: folder of the source's small files: itself, or what `carry_companions` made of
            it.
    """
    config = carried_config(carried_from)
    chosen = options or (options_of(config) if config else ExportOptions())
    if tokenizer is not None:
        tokenizer.save_to(folder)
        if options is None or options.eos_token_id is None:
            chosen = replace(chosen, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    elif carried_from is not None:
        _copy_files(carried_from, folder, (*TOKENIZER_FILES, _GENERATION))
    if (
        options is None
        and config
        and carried_from is not None
        and _is_native(config) == (layout == "hf")
    ):
        _copy_files(carried_from, folder, _PREPROCESSORS)
    written = model_json(model, layout=layout, dtype=dtype_name(dtype), options=chosen)
    files.write_json(folder / "config.json", written)
    if layout != "hf":  # that one is transformers' own
        write_remote_code(folder)
    for name, contents in (
        (_GENERATION, generation_json(chosen)),
        (_PREPROCESSORS[0], preprocessor_json(model, layout=layout, options=chosen)),
    ):
        if not (folder / name).exists():
            files.write_json(folder / name, contents)


def carry_companions(source: Path, folder: Path, *, tokenizer: Tokenizer | None = None) -> None:
    """Keep a Hugging Face folder's small files in a Megatron checkpoint, for the way back.

    Args:
        source: the Hugging Face folder.
        folder: made if there is anything to keep.
        tokenizer: kept instead of the folder's.
    """
    if tokenizer is not None:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_to(folder)
    names = (*TOKENIZER_FILES, _GENERATION, *_PREPROCESSORS)
    if (source / "config.json").exists() or any((source / name).exists() for name in names):
        folder.mkdir(parents=True, exist_ok=True)
        _copy_files(source, folder, names)
        if (source / "config.json").exists():
            # Under another name: transformers' tokenizers would look at it and not know the model.
            shutil.copyfile(source / "config.json", folder / _CARRIED_CONFIG)


def carried_config(folder: Path | None) -> Json | None:
    """config.json of a Hugging Face folder, or the one kept by `carry_companions`; None without."""
    for name in ("config.json", _CARRIED_CONFIG):
        if folder is not None and (folder / name).exists():
            return files.read_json(folder / name)
    return None


def _is_native(config: Json) -> bool:
    return config.get("model_type") == "internvl"


def _copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of the files that are there; a file that the target has already is kept."""
    for name in names:
        if (source / name).is_file() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)
