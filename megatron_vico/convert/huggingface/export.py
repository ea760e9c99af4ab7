"""Writes a Hugging Face folder: the weights file by file, and what belongs beside them."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megatron_vico import files
from megatron_vico.checkpoint.integrity import Sum
from megatron_vico.checkpoint.ranks import Ranks
from megatron_vico.config.stages import MODULES
from megatron_vico.convert.huggingface import safetensors_folder
from megatron_vico.convert.huggingface.config import (
    ExportOptions,
    Json,
    generation_json,
    model_json,
    preprocessor_json,
    processor_json,
)
from megatron_vico.convert.huggingface.safetensors_folder import Group, Shard
from megatron_vico.convert.huggingface.tokenizer_files import complete_tokenizer
from megatron_vico.convert.names.internvl import entries
from megatron_vico.convert.options import MAX_SHARD_BYTES, Layout
from megatron_vico.convert.remote_code_files import write_remote_code
from megatron_vico.convert.source import Source, TensorInfo, dtype_name
from megatron_vico.data.encode.tokenizer import HF_FILES, Tokenizer, load_tokenizer
from megatron_vico.errors import CheckpointError, ConfigError, listed

TOKENIZER_FILES = (*HF_FILES, "tokenizer.model", "sentencepiece.model", "chat_template.json")

GENERATION = "generation_config.json"
PREPROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_CARRIED_CONFIG = "source_config.json"


def shards_of(
    source: Source, layout: Layout, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Shard]:
    """The files that a model's weights make, unwritten; what the source has more is left out.

    Above `max_shard_bytes` a new one begins. CheckpointError if the source lacks a tensor.
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
) -> dict[str, Sum]:
    """Write the files of `shards_of` and their index; called by every rank, which share the files.

    `written` is called with the bytes that this rank has written, tensor by tensor.

    Returns:
        Checksums of the files that this rank has written.

    Raises:
        CheckpointError, OSError: on all ranks, if one could not read, or write.
    """
    rows = {row.files: row for row in entries(source.model, layout=layout).values() if row.files}

    def make(group: Group) -> tuple[Tensor, ...]:
        row = rows[tuple(group)]
        return row.kind.to_hf(source.read_tensor(row.megatron))

    def write() -> dict[str, Sum]:
        own = ranks.share([shard.num_bytes for shard in shards])
        return {
            shards[index].file: safetensors_folder.write_shard(
                folder, shards[index], make=make, written=written
            )
            for index in own
        }

    sums = ranks.agree(write)
    ranks.on_main(lambda: safetensors_folder.write_index(folder, shards))
    return sums


def write_companions(
    folder: Path,
    source: Source,
    *,
    layout: Layout,
    options: ExportOptions,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write what belongs beside the weights: JSON files and the tokenizer (unset, the source's).

    The source's own small files travel along as they are.
    """
    model, carried_from = source.model, source.companions
    config = carried_config(carried_from)
    if tokenizer is not None:
        tokenizer.save_to(folder)
    elif carried_from is not None:
        _copy_files(carried_from, folder, TOKENIZER_FILES)
    chosen = _with_ids(options, tokenizer or _tokenizer_in(folder), is_new=tokenizer is not None)
    from_same_form = config is not None and _is_native(config) == (layout == "hf")
    complete_tokenizer(folder, native=layout == "hf", written_for_it=from_same_form)
    trained = source.trained
    written = model_json(
        model,
        layout=layout,
        dtype=dtype_name(source.dtype),
        options=chosen,
        untrained=() if trained is None else [each for each in MODULES if each not in trained],
    )
    files.write_json(folder / "config.json", written)
    if layout != "hf":  # that one is transformers' own
        write_remote_code(folder)
    made = {
        GENERATION: generation_json(chosen),
        PREPROCESSORS[0]: preprocessor_json(model, layout=layout, options=chosen),
    }
    if layout == "hf":
        made[PREPROCESSORS[1]] = processor_json(model)
    for name, contents in made.items():
        if carried_from is not None and (name == GENERATION or from_same_form):
            _copy_files(carried_from, folder, (name,))
        if (folder / name).exists():
            carried = files.read_json(folder / name)
            contents = _kept(carried, contents, new_ids=chosen != options and tokenizer is not None)
            if contents == carried:
                continue
        files.write_json(folder / name, contents)
    if carried_from is not None and from_same_form:
        _copy_files(carried_from, folder, PREPROCESSORS)


def carry_companions(source: Path, folder: Path, *, tokenizer: Tokenizer | None = None) -> None:
    """Keep a Hugging Face folder's small files in a Megatron checkpoint, for the way back.

    `folder` is made if there is anything to keep; a given tokenizer is kept instead of its own.
    """
    if tokenizer is not None:
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_to(folder)
    names = (*TOKENIZER_FILES, GENERATION, *PREPROCESSORS)
    config = carried_config(source)
    if config is not None or any((source / name).exists() for name in names):
        folder.mkdir(parents=True, exist_ok=True)
        _copy_files(source, folder, names if tokenizer is None else (GENERATION, *PREPROCESSORS))
        if config is not None:
            # Under another name: transformers' tokenizers would look at it and not know the model.
            files.write_json(folder / _CARRIED_CONFIG, config)


def check_companions(folder: Path) -> None:
    """Raise CheckpointError for a small JSON file that is broken, before hours of writing."""
    for name in (*TOKENIZER_FILES, GENERATION, *PREPROCESSORS):
        if name.endswith(".json") and (folder / name).exists():
            files.read_json(folder / name)


def carried_config(folder: Path | None) -> Json | None:
    """config.json of a Hugging Face folder, or the one kept by `carry_companions`; None without."""
    for name in ("config.json", _CARRIED_CONFIG):
        if folder is not None and (folder / name).exists():
            return files.read_json(folder / name)
    return None


def _tokenizer_in(folder: Path) -> Tokenizer | None:
    """The tokenizer in a folder; None where there is none, or one without InternVL's tokens."""
    try:
        return load_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    except ConfigError:
        return None


def _with_ids(
    options: ExportOptions, tokenizer: Tokenizer | None, *, is_new: bool
) -> ExportOptions:
    """Options with the ids that end an answer and fill a batch; a new tokenizer's own win."""
    if tokenizer is None:
        return options
    stops = options.stop_ids
    if not stops or (is_new and tokenizer.eos_id not in stops):
        options = replace(options, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    if options.pad_token_id is None:
        options = replace(options, pad_token_id=tokenizer.pad_id)
    return options


def _kept(carried: Json, made: Json, *, new_ids: bool) -> Json:
    """A carried file's contents; most tiles, new ids and ids that it lacks are as in the made one.

    A processor's file can have the image processor's in it.
    """
    for name in ("eos_token_id", "pad_token_id"):
        if name in made and (new_ids or carried.get(name) is None):
            carried = carried | {name: made[name]}
    tiles = {"max_patches": made["max_patches"]} if "max_patches" in made else {}
    nested = carried.get("image_processor")
    if isinstance(nested, dict):
        return carried | {"image_processor": nested | tiles}
    return carried | tiles


def _is_native(config: Json) -> bool:
    return config.get("model_type") == "internvl"


def _copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of the files that are there; a file that the target has already is kept."""
    for name in names:
        if (source / name).is_file() and not (target / name).exists():
            files.copy_without_code(source / name, target / name)
