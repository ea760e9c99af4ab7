"""Whole models in and out of Hugging Face's form, in one process: export, import, and conversion of folders."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypedDict

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_vico.checkpoint import hf_io, state
from megatron_vico.checkpoint.hf_config import (
    ExportOptions,
    generation_json,
    layout_of,
    model_json,
    model_of,
    preprocessor_json,
)
from megatron_vico.checkpoint.internvl_mapping import Entry, Layout, canonical_name, entries
from megatron_vico.checkpoint.remote_code_files import write_remote_code
from megatron_vico.config.schema import ParallelOptions
from megatron_vico.data.tokenizer import Tokenizer, load_tokenizer
from megatron_vico.errors import CheckpointError
from megatron_vico.models.build import (
    build_language_model,
    build_vision_encoder,
    language_transformer_config,
    padded_vocab_size,
    vision_transformer_config,
)
from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.models.language_model import LanguageModel
from megatron_vico.models.registry import ModelConfig, get_model_config
from megatron_vico.parallel import groups as process_groups

DTypeName = Literal["fp32", "bf16"]

TOKENIZER_FOLDER = "tokenizer"
"""In a converted Megatron checkpoint: the tokenizer that came with the weights."""

_CARRIED_FILES = (*hf_io.TOKENIZER_FILES, "generation_config.json")


@dataclass(frozen=True, kw_only=True)
class ImportedModel:
    """A Hugging Face folder under Megatron's names."""

    model: ModelConfig
    layout: Layout
    encoder: dict[str, Tensor]
    """Names as in VisionEncoder.state_dict(); without connector_16x and ViR unless the layout is flash."""

    language_model: dict[str, Tensor]
    """Names as in LanguageModel.state_dict()."""

    absent: tuple[str, ...]
    """Canonical names of the tensors that the layout does not hold."""

    def canonical_state(self) -> dict[str, Tensor]:
        """Both modules' tensors under the table's names."""
        tensors = {f"encoder.{name}": tensor for name, tensor in self.encoder.items()}
        return tensors | {f"language_model.{name}": tensor for name, tensor in self.language_model.items()}


def export_hf(
    out_dir: str | Path,
    *,
    encoder: VisionEncoder,
    language_model: LanguageModel,
    model: ModelConfig,
    layout: Layout,
    tokenizer: Tokenizer | None = None,
    options: ExportOptions | None = None,
) -> Path:
    """Write a model, whole in this process, as a Hugging Face checkpoint.

    Args:
        out_dir: where to; must not exist, or be empty.
        encoder: the vision encoder, outside of DDP.
        language_model: the language model, outside of DDP.
        model: their size.
        layout: which names and config fields; `internvl` and `hf` leave connector_16x and ViR out.
        tokenizer: written beside the weights.
        options: what the config files say; unset, the defaults.

    Returns:
        The folder.

    Raises:
        CheckpointError: if a tensor is not in the table, one of the table is missing, or the folder cannot be written.
    """
    tensors = canonical_state({"encoder": encoder, "language_model": language_model})
    with hf_io.new_folder(out_dir) as folder:
        if tokenizer is not None:
            tokenizer.save_to(folder)
        _write_model(folder, tensors, model=model, layout=layout, options=_with_tokenizer(options, tokenizer))
    return Path(out_dir)


def import_hf(directory: str | Path, *, model_size: str | None = None) -> ImportedModel:
    """Read a Hugging Face checkpoint; its layout and size are found from config.json and checked against the tensors.

    Args:
        directory: a folder in any of the three layouts.
        model_size: the size it should be; unset, any known one.

    Returns:
        Its tensors under Megatron's names, as stored.

    Raises:
        CheckpointError: if a file is broken, the size is another one, or a tensor is missing, unknown or misshapen.
    """
    folder = hf_io.open_folder(directory)
    path = folder.path / "config.json"
    config = hf_io.read_json(path)
    layout = layout_of(config, path=str(path), tensors=folder.tensors.keys())
    model = model_of(config, layout=layout, path=str(path), expected=model_size)
    rows = list(entries(model, layout=layout, padded_vocab_size=padded_vocab_size(model.language.vocab_size, 1)))
    expected = {name for row in rows for name in row.files}
    _check_names(folder.tensors.keys(), expected, where=f"{folder.path} ({layout} layout of {model.name})")
    found: dict[str, Tensor] = {}
    for row in rows:
        for name, shape in zip(row.files, _file_shapes(row), strict=True):
            _check_shape(name, folder.tensors[name].shape, shape, where=str(folder.tensors[name].file))
        if row.files:
            found[row.megatron] = row.kind.to_megatron([folder.read(name) for name in row.files])
    return ImportedModel(
        model=model,
        layout=layout,
        encoder=_of_module("encoder", found),
        language_model=_of_module("language_model", found),
        absent=tuple(row.megatron for row in rows if not row.files),
    )


def load_imported(imported: ImportedModel, *, encoder: VisionEncoder, language_model: LanguageModel) -> None:
    """Copy imported tensors into modules; what the layout does not hold keeps the module's fresh values.

    Args:
        imported: from `import_hf`.
        encoder: of the same size.
        language_model: of the same size.

    Raises:
        CheckpointError: if a module has a tensor that was not imported, or lacks one that was, or has another shape.
    """
    modules: Mapping[str, MegatronModule] = {"encoder": encoder, "language_model": language_model}
    target = canonical_state(modules)
    source = imported.canonical_state()
    _check_names(target.keys(), source.keys() | set(imported.absent), where="the model to load into")
    with torch.no_grad():
        for name, tensor in source.items():
            _check_shape(name, target[name].shape, tuple(tensor.shape), where="the model to load into")
            target[name].copy_(tensor)


def canonical_state(modules: Mapping[str, MegatronModule]) -> dict[str, Tensor]:
    """The tensors of modules under the table's names, whichever spec they were built with.

    Args:
        modules: by name, `encoder` and `language_model`, outside of DDP.

    Returns:
        Canonical name -> the module's own tensor (not a copy).
    """
    tensors: dict[str, Tensor] = {}
    for prefix, module in modules.items():
        for key, tensor in module.state_dict().items():
            name = canonical_name(key)
            if name is not None:
                tensors[f"{prefix}.{name}"] = tensor
    return tensors


def convert(
    source: str | Path,
    *,
    output: str | Path,
    layout: Layout | Literal["megatron"],
    model_size: str | None = None,
    dtype: DTypeName | None = None,
    tokenizer_model: str | Path | None = None,
    options: ExportOptions | None = None,
    seed: int = 1234,
) -> Path:
    """Convert a checkpoint folder between Megatron's form and Hugging Face's, or between two layouts of the latter.

    Args:
        source: a run's folder (megatron-core's form) or a Hugging Face folder; which one is found from its files.
        output: where to; must not exist, or be empty.
        layout: of the output.
        model_size: the size it should be; unset, the one the source says it is.
        dtype: of the output's weights; unset, the source's.
        tokenizer_model: tokenizer to put beside exported weights; unset, the one that came with the source.
        options: what the exported config files say; unset, the defaults.
        seed: of connector_16x and ViR where the source has none.

    Returns:
        The output folder.

    Raises:
        CheckpointError: if the source is broken, of another size, or has no tensors for parts of the output's layout.
    """
    source, output = Path(source), Path(output)
    hf_io.refuse_incomplete(source)
    if output.resolve() == source.resolve():
        raise CheckpointError(f"{output} is both input and output; the input is never touched, so name another folder.")
    if layout == "megatron":
        _hf_to_megatron(source, output, model_size=model_size, dtype=dtype, seed=seed)
        return output
    read = _read_megatron if _is_megatron(source) else _read_hf
    origin = read(source, layout=layout, model_size=model_size)
    tensors = origin.tensors
    if dtype is not None:
        tensors = {name: tensor.to(hf_io.as_dtype(dtype)) for name, tensor in tensors.items()}
    tokenizer = load_tokenizer(tokenizer_model) if tokenizer_model is not None else None
    with hf_io.new_folder(output) as folder:
        if tokenizer is not None:
            tokenizer.save_to(folder)
        else:
            hf_io.copy_files(origin.companions, folder, _CARRIED_FILES)
        _write_model(folder, tensors, model=origin.model, layout=layout, options=_with_tokenizer(options, tokenizer))
    return output


@dataclass(frozen=True, kw_only=True)
class _Origin:
    """What a conversion to a Hugging Face layout starts from."""

    model: ModelConfig
    tensors: Mapping[str, Tensor]
    companions: Path
    """Folder of the tokenizer and other files that travel along."""


def _is_megatron(folder: Path) -> bool:
    return (folder / state.LATEST_FILE).exists()


def _write_model(
    folder: Path, tensors: Mapping[str, Tensor], *, model: ModelConfig, layout: Layout, options: ExportOptions
) -> None:
    embedding = tensors.get("language_model.gpt.embedding.word_embeddings.weight")
    rows = list(entries(model, layout=layout, padded_vocab_size=None if embedding is None else embedding.size(0)))
    wanted = {row.megatron for row in rows if row.files}
    # A source without connector_16x and ViR serves the layouts that have no place for them either.
    optional = {row.megatron for row in rows if not row.files}
    where = f"the model to export as {model.name}"
    _check_names(tensors.keys() - optional, wanted, where=where)
    for row in rows:
        if row.files:
            _check_shape(row.megatron, tensors[row.megatron].shape, row.shape, where=where)
    files = (pair for row in rows for pair in zip(row.files, _to_files(row, tensors), strict=True))
    hf_io.write_folder(folder, tensors=files)
    dtype = hf_io.dtype_name(next(iter(tensors.values())))
    hf_io.write_json(folder / "config.json", model_json(model, layout=layout, dtype=dtype, options=options))
    if layout != "hf":
        write_remote_code(folder)
    for name, contents in (
        ("generation_config.json", generation_json(options)),
        ("preprocessor_config.json", preprocessor_json(model, layout=layout, options=options)),
    ):
        if not (folder / name).exists():
            hf_io.write_json(folder / name, contents)


def _to_files(row: Entry, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return row.kind.to_hf(tensors[row.megatron]) if row.files else ()


def _file_shapes(row: Entry) -> tuple[tuple[int, ...], ...]:
    if not row.files:
        return ()
    return tuple(tuple(tensor.shape) for tensor in row.kind.to_hf(torch.empty(row.shape, device="meta")))


def _with_tokenizer(options: ExportOptions | None, tokenizer: Tokenizer | None) -> ExportOptions:
    chosen = options or ExportOptions()
    if tokenizer is None or chosen.eos_token_id is not None:
        return chosen
    return replace(chosen, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)


def _hf_to_megatron(source: Path, output: Path, *, model_size: str | None, dtype: DTypeName | None, seed: int) -> None:
    if _is_megatron(source):
        raise CheckpointError(f"{source} is a Megatron checkpoint already; name a layout: internvl, hf or flash.")
    imported = import_hf(source, model_size=model_size)
    if output.exists() and any(output.iterdir()):
        raise CheckpointError(f"{output} exists already and is not empty; remove it, or write to another folder.")
    formats = {tensor.dtype for tensor in (*imported.encoder.values(), *imported.language_model.values())}
    wanted = hf_io.as_dtype(dtype) if dtype is not None else _widest(formats)
    with process_groups.started(ParallelOptions(), seed=seed, timeout_minutes=10) as groups:
        modules = _fresh_modules(imported.model, wanted, groups)
        load_imported(imported, **modules)
        if any((source / name).exists() for name in _CARRIED_FILES):
            (output / TOKENIZER_FOLDER).mkdir(parents=True, exist_ok=True)
            hf_io.copy_files(source, output / TOKENIZER_FOLDER, _CARRIED_FILES)
        metadata = state.CheckpointMetadata(model_size=imported.model.name, stage="converted")
        state.save_checkpoint(output, 0, modules=modules, metadata=metadata)


def _read_hf(source: Path, *, layout: Layout, model_size: str | None) -> _Origin:
    imported = import_hf(source, model_size=model_size)
    if imported.absent and layout == "flash":
        raise CheckpointError(
            f"{source} has no connector_16x and no ViR ({imported.layout} layout), so it is no Flash model yet; "
            "convert it to Megatron's form, train it, and export that."
        )
    return _Origin(model=imported.model, tensors=imported.canonical_state(), companions=source)


def _read_megatron(source: Path, *, layout: Layout, model_size: str | None) -> _Origin:
    model = get_model_config(state.read_metadata(source).model_size)
    dtype = _widest(state.weight_dtypes(source, modules=("encoder", "language_model")))
    with process_groups.started(ParallelOptions(), seed=0, timeout_minutes=10) as groups:
        modules = _fresh_modules(model, dtype, groups)
        state.load_weights(source, modules=modules, model_size=model_size or model.name)
        return _Origin(model=model, tensors=canonical_state(modules), companions=source / TOKENIZER_FOLDER)


class _Modules(TypedDict):
    encoder: VisionEncoder
    language_model: LanguageModel


def _fresh_modules(model: ModelConfig, dtype: torch.dtype, groups: process_groups.Groups) -> _Modules:
    bf16 = dtype == torch.bfloat16
    # The encoder first, so that what a source lacks (connector_16x, ViR) depends on the seed alone.
    encoder = build_vision_encoder(model, vision_transformer_config(model, bf16=bf16), pg_collection=groups.encoder)
    language_model = build_language_model(
        model, language_transformer_config(model, bf16=bf16), pg_collection=groups.language, attention="sdpa"
    )
    return {"encoder": encoder.to(groups.device, dtype), "language_model": language_model.to(groups.device, dtype)}


def _widest(formats: Iterable[torch.dtype]) -> torch.dtype:
    """The format that holds all weights without loss."""
    found = set(formats)
    if found == {torch.bfloat16}:
        return torch.bfloat16
    if found <= {torch.bfloat16, torch.float16, torch.float32}:
        return torch.float32
    raise CheckpointError(f"weights are stored as {sorted(map(str, found))}; expected bfloat16, float16 or float32.")


def _of_module(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): each for name, each in tensors.items() if name.startswith(f"{prefix}.")}


def _check_names(found: Iterable[str], expected: Iterable[str], *, where: str) -> None:
    found, expected = set(found), set(expected)
    if found != expected:
        absent, unknown = hf_io.listed(expected - found), hf_io.listed(found - expected)
        raise CheckpointError(f"{where}: missing tensors: {absent}; tensors that no row maps: {unknown}.")


def _check_shape(name: str, found: Sequence[int], expected: Sequence[int], *, where: str) -> None:
    if tuple(found) != tuple(expected):
        raise CheckpointError(f"{where}: {name} has shape {tuple(found)}, expected {tuple(expected)}.")
