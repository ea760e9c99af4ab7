"""Where a conversion's tensors come from: a Hugging Face folder, a Megatron checkpoint, modules in
memory.

All look the same: names of the table, forms without reading anything, and a function that reads one
tensor. Embedding and head have the real vocabulary's rows: what Megatron adds to them stays on its
side.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_vico import files
from megatron_vico.checkpoint import run_folder
from megatron_vico.config.config_json import read_model
from megatron_vico.config.registry import ModelConfig
from megatron_vico.convert.huggingface import safetensors_folder
from megatron_vico.convert.huggingface.config import layout_of
from megatron_vico.convert.huggingface.safetensors_folder import StoredTensor, TensorForm
from megatron_vico.convert.initial import initial_tensor
from megatron_vico.convert.megatron.reader import open_dcp
from megatron_vico.convert.names.internvl import Entry, Layout, entries
from megatron_vico.convert.names.kinds import PaddedVocabulary
from megatron_vico.errors import CheckpointError, listed

TOKENIZER_FOLDER = "tokenizer"
"""In a converted Megatron checkpoint: the tokenizer that came with the weights."""

_LAYER = re.compile(r".*\.layers\.\d+\.")
# How experts are told apart: modules of their own in the local spec, numbered weights of one
# grouped layer in TransformerEngine's.
_EXPERTS = (
    (re.compile(r"mlp\.experts\.local_experts\.(\d+)\."), r"mlp.experts.experts.\1."),
    (
        re.compile(r"mlp\.experts\.linear_fc([12])\.weight(\d+)$"),
        r"mlp.experts.experts.\2.linear_fc\1.weight",
    ),
)
_WEIGHTS = ("encoder.", "language_model.")
_FORMATS = (torch.bfloat16, torch.float16, torch.float32)


class TensorFolder(Protocol):
    """What is read of a `SafetensorsFolder`; several folders joined can stand in for one."""

    @property
    def path(self) -> Path:
        """Where it is."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """By name, without their values."""

    def read(self, name: str) -> Tensor:
        """One tensor, as stored."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The tensors of a model, none of them read."""

    model: ModelConfig

    where: str
    """For errors: which folder, and what it is."""

    forms: Mapping[str, TensorForm]
    """By the table's names, in its order."""

    read: Callable[[str], Tensor]
    """The tensor of a name in `forms`."""

    companions: Path | None = None
    """Folder of the tokenizer and other files that travel along."""

    layout: Layout | None = None
    """Of a Hugging Face folder."""

    @property
    def dtype(self) -> torch.dtype:
        """The format that most of its numbers have."""
        counts: Counter[torch.dtype] = Counter()
        for form in self.forms.values():
            counts[form.dtype] += form.num_bytes // form.dtype.itemsize
        return counts.most_common(1)[0][0]


def is_megatron(folder: Path) -> bool:
    """Whether a folder is a run's, in megatron-core's form."""
    return (folder / run_folder.LATEST_FILE).exists()


def open_source(
    path: str | Path,
    *,
    model_size: str | None = None,
    layout: Layout | None = None,
    iteration: int | None = None,
) -> Source:
    """A checkpoint folder as a source, whichever form it has.

    Args:
        path: a run's folder, or a Hugging Face folder.
        model_size: the size it should be; unset, the one it says it is.
        layout: a Hugging Face folder's should be; unset, any.
        iteration: which step of a run; unset, the latest.

    Returns:
        The source.

    Raises:
        CheckpointError: if it is broken, of another size or layout, or a tensor is missing, unknown
            or misshapen.
    """
    folder = Path(path)
    files.refuse_incomplete(folder)
    if is_megatron(folder):
        return megatron_source(folder, model_size=model_size, iteration=iteration)
    return hf_source(safetensors_folder.open_folder(folder), model_size=model_size, layout=layout)


def hf_source(
    folder: TensorFolder, *, model_size: str | None = None, layout: Layout | None = None
) -> Source:
    """A Hugging Face folder as a source; layout and size are found from config.json and checked
    against the tensors.

    Args:
        folder: with config.json beside the weights.
        model_size: the size it should be; unset, any known one.
        layout: what it should be; unset, any.

    Returns:
        The source, without what the layout does not hold.

    Raises:
        CheckpointError: if the size or layout is another one, or a tensor is missing, unknown or
            misshapen.
    """
    path = folder.path / "config.json"
    config = files.read_json(path)
    found = layout_of(config, path=str(path), tensors=folder.tensors.keys())
    if layout not in (None, found):
        raise CheckpointError(
            f"{folder.path} has the {found} layout, expected {layout}; give --layout {found}, or"
            " none."
        )
    model = read_model(config, path=str(path), expected=model_size)
    return files_source(folder, model=model, layout=found)


def files_source(
    folder: TensorFolder, *, model: ModelConfig, layout: Layout, without: Sequence[str] = ()
) -> Source:
    """Tensors of known size and layout as a source; needs no config.json.

    Args:
        folder: of the tensors.
        model: their size.
        layout: whose names they have.
        without: beginnings of the table's names that the folder lacks beyond what the layout lacks,
            such as `initial.CONNECTOR_4X` where a vision tower and a language model come apart.

    Returns:
        The source.

    Raises:
        CheckpointError: if a tensor is missing, unknown or misshapen, or has no floating-point
            format.
    """
    rows = {
        name: row
        for name, row in entries(model, layout=layout).items()
        if row.files and not name.startswith(tuple(without))
    }
    where = f"{folder.path} ({layout} layout of {model.name})"
    check_names(
        folder.tensors.keys(), [name for row in rows.values() for name in row.files], where=where
    )
    forms = {name: _checked_form(row, folder.tensors) for name, row in rows.items()}

    def read(name: str) -> Tensor:
        row = rows[name]
        return row.kind.to_megatron([folder.read(file) for file in row.files])

    return Source(
        model=model, where=where, forms=forms, read=read, companions=folder.path, layout=layout
    )


def megatron_source(
    path: str | Path, *, model_size: str | None = None, iteration: int | None = None
) -> Source:
    """A Megatron checkpoint's weights as a source, saved under whatever layout.

    Args:
        path: the run's folder.
        model_size: the size it should be; unset, the one it says it is.
        iteration: which step; unset, the latest.

    Returns:
        The source.

    Raises:
        CheckpointError: if it is no checkpoint, of another size, or a tensor is missing, unknown or
            misshapen.
    """
    folder = run_folder.find_iteration(path, iteration)
    model = run_folder.model_of_run(path, iteration=iteration, expected=model_size)
    stored = open_dcp(folder)
    tables = entries(model, layout="flash")
    where = f"{folder} (Megatron checkpoint of {model.name})"
    check_names((name for name in stored.tensors if name.startswith(_WEIGHTS)), tables, where=where)
    forms = {}
    for name, row in tables.items():
        found = stored.tensors[name]
        # Padded for the number of ranks that wrote it: only the real vocabulary's rows count.
        padded = isinstance(row.kind, PaddedVocabulary) and found.shape[0] >= row.shape[0]
        shape = (row.shape[0], *found.shape[1:]) if padded else found.shape
        check_shape(name, shape, row.shape, where=where)
        forms[name] = TensorForm(shape=row.shape, dtype=found.dtype)

    def read(name: str) -> Tensor:
        return stored.read(name)[: forms[name].shape[0]]

    return Source(
        model=model, where=where, forms=forms, read=read, companions=Path(path) / TOKENIZER_FOLDER
    )


def module_source(modules: Mapping[str, MegatronModule], *, model: ModelConfig) -> Source:
    """Modules that are whole in this process as a source.

    Args:
        modules: by name, `encoder` and `language_model`, outside of DDP.
        model: their size.

    Returns:
        The source; reading gives the modules' own tensors, not copies.

    Raises:
        CheckpointError: if a tensor is not in the table, or one of the table is missing or
            misshapen.
    """
    tensors = canonical_state(modules)
    where = f"the model to export as {model.name}"
    tables = entries(model, layout="flash")
    check_names(tensors, tables, where=where)
    for name, row in tables.items():
        if isinstance(row.kind, PaddedVocabulary):
            tensors[name] = tensors[name][: row.shape[0]]
        check_shape(name, tensors[name].shape, row.shape, where=where)
    forms = {
        name: TensorForm(shape=tuple(tensors[name].shape), dtype=tensors[name].dtype)
        for name in tables
    }
    return Source(model=model, where=where, forms=forms, read=tensors.__getitem__)


def canonical_state(modules: Mapping[str, MegatronModule]) -> dict[str, Tensor]:
    """The tensors of modules under the table's names, whichever spec they were built with.

    Args:
        modules: by name, `encoder` and `language_model`, outside of DDP.

    Returns:
        Name -> the module's own tensor (not a copy); without TransformerEngine's `_extra_state`,
        which holds no weights.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, module in modules.items():
        # megatron-core's own map from a layer's names to those on the disk; the layer's spec has it
        # (models/build.py).
        maps = {
            f"{path}.": layer.submodules_config.sharded_state_dict_keys_map
            for path, layer in module.named_modules()
            if isinstance(layer, TransformerLayer)
        }
        for key, tensor in module.state_dict().items():
            if not key.endswith("_extra_state"):
                tensors[f"{prefix}.{_stored_name(key, maps)}"] = tensor
    return tensors


def _stored_name(key: str, maps: Mapping[str, Mapping[str, str]]) -> str:
    layer = _LAYER.match(key)
    if layer is None:
        return key
    start, rest = layer[0], key[layer.end() :]
    for own, stored in maps.get(start, {}).items():
        if rest.startswith(own):
            rest = stored + rest.removeprefix(own)
    for pattern, stored in _EXPERTS:
        rest = pattern.sub(stored, rest)
    return start + rest


def completed(source: Source, *, seed: int) -> Source:
    """A source with initial values for what it lacks; what it has stays as it is.

    Args:
        source: without connector_16x and ViR, or without any connector.
        seed: see convert/initial.py.

    Returns:
        A source of every tensor of the table.
    """
    shapes = {name: row.shape for name, row in entries(source.model, layout="flash").items()}
    dtype = source.dtype
    forms = {
        name: source.forms.get(name) or TensorForm(shape=shape, dtype=dtype)
        for name, shape in shapes.items()
    }

    def read(name: str) -> Tensor:
        if name in source.forms:
            return source.read(name)
        return initial_tensor(name, shapes=shapes, seed=seed).to(dtype)

    return replace(source, forms=forms, read=read)


def cast(source: Source, dtype: torch.dtype) -> Source:
    """A source whose tensors all have one format."""
    forms = {name: replace(form, dtype=dtype) for name, form in source.forms.items()}
    return replace(source, forms=forms, read=lambda name: source.read(name).to(dtype))


def check_names(found: Iterable[str], expected: Iterable[str], *, where: str) -> None:
    """CheckpointError that lists names if the two differ."""
    found, expected = set(found), set(expected)
    if found != expected:
        absent, unknown = listed(expected - found), listed(found - expected)
        raise CheckpointError(
            f"{where}: missing tensors: {absent}; tensors that no row maps: {unknown}."
        )


def check_shape(name: str, found: Sequence[int], expected: Sequence[int], *, where: str) -> None:
    """CheckpointError with both shapes if they differ."""
    if tuple(found) != tuple(expected):
        raise CheckpointError(
            f"{where}: {name} has shape {tuple(found)}, expected {tuple(expected)}."
        )


def _checked_form(row: Entry, stored: Mapping[str, StoredTensor]) -> TensorForm:
    for name, shape in zip(row.files, row.file_shapes, strict=True):
        check_shape(name, stored[name].shape, shape, where=str(stored[name].file))
    formats = {stored[name].torch_dtype for name in row.files}
    if len(formats) > 1:
        each = ", ".join(f"{name} is {stored[name].dtype}" for name in row.files)
        raise CheckpointError(
            f"{stored[row.files[0]].file}: {each}; tensors that Megatron joins need one format."
        )
    if not formats <= set(_FORMATS):
        name = row.files[0]
        raise CheckpointError(
            f"{stored[name].file}: {name} is {stored[name].dtype}, expected BF16, F16 or F32."
        )
    return TensorForm(shape=row.shape, dtype=formats.pop())
