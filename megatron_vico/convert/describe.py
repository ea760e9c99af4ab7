"""What a checkpoint folder holds, Megatron's or Hugging Face's: read from headers and metadata
alone.

Its weights are at hand under the mapping table's names whatever the form, to be read one at a time,
so that a run's folder of any parallel layout can be compared with an export in any of Hugging
Face's layouts (compare.py).
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_vico import files
from megatron_vico.checkpoint import run_folder
from megatron_vico.config.config_json import read_model
from megatron_vico.config.registry import ModelConfig
from megatron_vico.convert.huggingface import safetensors_folder
from megatron_vico.convert.huggingface.config import layout_of
from megatron_vico.convert.megatron.reader import DcpFolder, open_dcp
from megatron_vico.convert.names.internvl import Entry, entries
from megatron_vico.errors import CheckpointError, listed

UNMAPPED = "unmapped"
"""Module of a tensor that the mapping table does not know."""

OPTIMIZER = "optimizer"
"""Module of an optimizer's state and of its copies of the weights."""

_MODULES = (
    ("vit", r"encoder\.vit\."),
    ("connector_4x", r"encoder\.connector_4x\."),
    ("connector_16x", r"encoder\.connector_16x\."),
    ("vir", r"encoder\.vir\."),
    ("language_model embedding", r"language_model\.gpt\.embedding\."),
    (
        "language_model attention",
        r"language_model\.gpt\..*\.self_attention\.(?!linear_qkv\.layer_norm_)",
    ),
    ("language_model norms", r"language_model\.gpt\..*(_layernorm\.|\.layer_norm_)"),
    ("language_model router", r"language_model\.gpt\..*\.mlp\.router\."),
    ("language_model experts", r"language_model\.gpt\..*\.mlp\.experts\."),
    ("language_model mlp", r"language_model\.gpt\..*\.mlp\."),
    ("language_model head", r"language_model\.gpt\.output_layer\."),
    (OPTIMIZER, r"optimizer\."),
)


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """One tensor of a folder, unread."""

    name: str
    """In a Hugging Face folder the file's; in a Megatron one the mapping table's, a layer and an
    expert at a time."""

    module: str
    """The model's part it belongs to: vit, connector_4x, ..., `optimizer`, or `unmapped`."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_parameters(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return self.num_parameters * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of the model under the table's name: what comparisons are between."""

    shape: tuple[int, ...]
    """Megatron's, without the rows that pad a vocabulary."""

    dtypes: frozenset[torch.dtype]
    """Of the file's tensors it is made of: one, unless those differ."""

    num_bytes: int
    read: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder, with nothing but headers and metadata read."""

    path: Path
    form: Literal["megatron", "hf"]
    model: ModelConfig
    facts: Mapping[str, str]
    """What the folder says it is, to be printed: layout, stage, iteration and the like."""

    tensors: tuple[TensorFacts, ...]
    problems: tuple[str, ...]
    """Tensors that are missing, unknown or misshapen for the model; empty when the folder is
    whole."""

    weights: Mapping[str, Weight]
    """By the table's name; a tensor that no row maps is here under its own."""


def open_checkpoint(
    directory: str | Path, *, iteration: int | None = None, model_size: str | None = None
) -> Checkpoint:
    """Find out what a folder is.

    Args:
        directory: a run's folder, one of its iter_ folders, or a Hugging Face folder in any layout.
        iteration: which step of a run; unset, the latest.
        model_size: the size it should be; unset, the one it says it is.

    Returns:
        The checkpoint; problems with its tensors are listed in it rather than raised.

    Raises:
        CheckpointError: if there is no checkpoint, it is unfinished or cannot be read, or of
            another or no known size.
    """
    path = Path(directory)
    files.refuse_incomplete(path)
    step = re.fullmatch(r"iter_(\d+)", path.name)
    if step is not None and not (path / run_folder.LATEST_FILE).exists():
        return _open_megatron(path.parent, iteration=int(step[1]), model_size=model_size)
    if (path / run_folder.LATEST_FILE).exists():
        return _open_megatron(path, iteration=iteration, model_size=model_size)
    if not list(path.glob("*.safetensors*")):
        raise CheckpointError(
            f"{path} is no checkpoint: it has neither {run_folder.LATEST_FILE}, as a"
            " run's folder has, nor safetensors, as one of Hugging Face's has."
        )
    if iteration is not None:
        raise CheckpointError(
            f"{path} is a Hugging Face folder, which has no steps; leave out --ckpt-step."
        )
    return _open_hf(path, model_size=model_size)


def matching(names: Iterable[str], pattern: str | None) -> list[str]:
    """Names in which a glob is found somewhere, in their order; all of them where there is no
    pattern."""
    return [name for name in names if pattern is None or fnmatchcase(name, f"*{pattern}*")]


def _open_megatron(root: Path, *, iteration: int | None, model_size: str | None) -> Checkpoint:
    metadata = run_folder.read_metadata(root, iteration)
    model = run_folder.model_of_run(root, iteration=iteration, expected=model_size)
    folder = open_dcp(run_folder.find_iteration(root, iteration))
    expected = {name: row.shape for name, row in entries(model, layout="flash").items()}
    tensors, weights, misshapen = [], {}, []
    for name, stored in folder.tensors.items():
        module = _module_of(name) if name in expected or name.startswith("optimizer.") else UNMAPPED
        tensors.append(
            TensorFacts(name=name, module=module, shape=stored.shape, dtype=stored.dtype)
        )
        if module == OPTIMIZER:
            continue
        weights[name] = _dcp_weight(name, folder, model)
        if name in expected and weights[name].shape != expected[name]:
            misshapen.append(f"{name} has shape {stored.shape}, expected {expected[name]}")
    return Checkpoint(
        path=folder.path,
        form="megatron",
        model=model,
        facts={
            "model_size": model.name,
            "stage": metadata.stage,
            "iteration": str(metadata.iteration),
            "layout": metadata.layout or "unknown",
            "has_optimizer": (
                str(metadata.has_optimizer)
                + (f" ({metadata.optimizer})" if metadata.optimizer else "")
            ),
        },
        tensors=_in_order(tensors),
        problems=_problems(weights.keys(), expected.keys(), misshapen),
        weights={
            name: weights[name]
            for name in [*expected, *sorted(weights.keys() - expected.keys())]
            if name in weights
        },
    )


def _open_hf(path: Path, *, model_size: str | None) -> Checkpoint:
    folder = safetensors_folder.open_folder(path)
    config_path = path / "config.json"
    config = files.read_json(config_path)
    layout = layout_of(config, path=str(config_path), tensors=folder.tensors.keys())
    model = read_model(config, path=str(config_path), expected=model_size)
    rows = [row for row in entries(model, layout=layout).values() if row.files]
    owner = {name: row for row in rows for name in row.files}
    tensors = []
    for name, stored in folder.tensors.items():
        module = _module_of(owner[name].megatron) if name in owner else UNMAPPED
        dtype = stored.torch_dtype
        tensors.append(TensorFacts(name=name, module=module, shape=stored.shape, dtype=dtype))
    misshapen, weights = [], {}
    for row in rows:
        wrong = list(_misshapen(row, folder))
        misshapen += wrong
        # A misshapen or half-present tensor cannot be put together; its parts are compared under
        # their own names.
        if not wrong and all(name in folder.tensors for name in row.files):
            weights[row.megatron] = _hf_weight(row, folder)
    used = {name for row in rows if row.megatron in weights for name in row.files}
    for name in sorted(folder.tensors.keys() - used):
        weights[name] = _raw_weight(name, folder)
    return Checkpoint(
        path=path,
        form="hf",
        model=model,
        facts={"model_size": model.name, "layout": layout},
        tensors=_in_order(tensors),
        problems=_problems(folder.tensors.keys(), owner.keys(), misshapen),
        weights=weights,
    )


def _dcp_weight(name: str, folder: DcpFolder, model: ModelConfig) -> Weight:
    stored = folder.tensors[name]
    # Rows beyond the vocabulary are there to be divided by the ranks: no token reads them, and no
    # file holds them.
    is_vocabulary = name.endswith((".word_embeddings.weight", ".gpt.output_layer.weight"))
    num_rows = min(stored.shape[0], model.language.vocab_size) if is_vocabulary else None
    shape = stored.shape if num_rows is None else (num_rows, *stored.shape[1:])
    return Weight(
        shape=shape,
        dtypes=frozenset({stored.dtype}),
        num_bytes=math.prod(shape) * stored.dtype.itemsize,
        read=lambda: folder.read(name)[:num_rows] if num_rows else folder.read(name),
    )


def _hf_weight(row: Entry, folder: safetensors_folder.SafetensorsFolder) -> Weight:
    dtypes = frozenset(folder.tensors[name].torch_dtype for name in row.files)
    return Weight(
        shape=row.shape,
        dtypes=dtypes,
        num_bytes=math.prod(row.shape) * max(dtype.itemsize for dtype in dtypes),
        read=lambda: row.kind.to_megatron([folder.read(name) for name in row.files]),
    )


def _raw_weight(name: str, folder: safetensors_folder.SafetensorsFolder) -> Weight:
    stored = folder.tensors[name]
    dtype = stored.torch_dtype
    return Weight(
        shape=stored.shape,
        dtypes=frozenset({dtype}),
        num_bytes=math.prod(stored.shape) * dtype.itemsize,
        read=lambda: folder.read(name),
    )


def _misshapen(row: Entry, folder: safetensors_folder.SafetensorsFolder) -> Iterator[str]:
    parts = row.kind.to_hf(torch.empty(row.shape, device="meta"))
    for name, part in zip(row.files, parts, strict=True):
        if name in folder.tensors and folder.tensors[name].shape != tuple(part.shape):
            yield f"{name} has shape {folder.tensors[name].shape}, expected {tuple(part.shape)}"


def _module_of(name: str) -> str:
    return next((module for module, pattern in _MODULES if re.match(pattern, name)), UNMAPPED)


def _problems(
    found: Collection[str], expected: Collection[str], misshapen: list[str]
) -> tuple[str, ...]:
    absent, unknown = set(expected) - set(found), set(found) - set(expected)
    return (
        *((f"missing: {listed(absent)}",) if absent else ()),
        *((f"unknown to the mapping table: {listed(unknown)}",) if unknown else ()),
        *((f"misshapen: {listed(misshapen)}",) if misshapen else ()),
    )


def _in_order(tensors: Iterable[TensorFacts]) -> tuple[TensorFacts, ...]:
    """By module, then by name with layers and experts counted up."""
    place = {module: number for number, (module, _) in enumerate(_MODULES)}

    def key(tensor: TensorFacts) -> tuple[int, list[tuple[int, str]]]:
        words = re.split(r"(\d+)", tensor.name)
        return place.get(tensor.module, len(place)), [
            (int(word) if word.isdecimal() else -1, word) for word in words
        ]

    return tuple(sorted(tensors, key=key))
