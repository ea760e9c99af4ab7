"""What a checkpoint folder holds, Megatron's or Hugging Face's, from headers and metadata alone."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_vico import files
from megatron_vico.checkpoint import run_folder
from megatron_vico.convert.open import OPTIMIZER, hf_source, is_megatron, megatron_source
from megatron_vico.convert.source import Contents, Source, TensorInfo
from megatron_vico.errors import CheckpointError

UNMAPPED = "unmapped"
"""Module of a tensor that the mapping table does not know."""

_MODULES = (
    ("vit", r"encoder\.vit\."),
    ("connector_4x", r"encoder\.connector_4x\."),
    ("connector_16x", r"encoder\.connector_16x\."),
    ("vir", r"encoder\.vir\."),
    ("language_model embedding", r"language_model\.gpt\.embedding\."),
    ("language_model attention", r"language_model\.gpt\..*\.self_attention\.(?!.*\.layer_norm_)"),
    ("language_model norms", r"language_model\.gpt\..*(_layernorm\.|\.layer_norm_)"),
    ("language_model router", r"language_model\.gpt\..*\.mlp\.router\."),
    ("language_model experts", r"language_model\.gpt\..*\.mlp\.experts\."),
    ("language_model mlp", r"language_model\.gpt\..*\.mlp\."),
    ("language_model head", r"language_model\.gpt\.output_layer\."),
)
PARTS = frozenset(module.split()[1] for module, _ in _MODULES if " " in module)
"""Of the language model."""

_POSITIONS = {module: position for position, (module, _) in enumerate(_MODULES)}
_POSITIONS |= {OPTIMIZER: len(_MODULES), UNMAPPED: len(_MODULES) + 1}


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A tensor of a folder, unread."""

    name: str
    """The folder's own; a Megatron checkpoint's is the table's, a layer and an expert at a time."""

    module: str
    """The model's part it belongs to: vit, connector_4x, ..., `optimizer`, or `unmapped`."""

    info: TensorInfo


def open_checkpoint(
    directory: str | Path, *, iteration: int | None = None, model_size: str | None = None
) -> Source:
    """A folder as a source; problems with its tensors are listed in it rather than raised.

    Args:
        directory: a run's folder, one of its iter_ folders, or a Hugging Face folder in any layout.
        iteration: which step of a run; unset, the latest.
        model_size: the size it should be; unset, the one it says it is.

    Raises:
        CheckpointError: if there is no checkpoint, it is unfinished or cannot be read, or of
            another or no known size.
    """
    path = Path(directory)
    files.refuse_incomplete(path)
    step = re.fullmatch(r"iter_(\d+)", path.name)
    if step is not None and not is_megatron(path):
        return megatron_source(path.parent, iteration=int(step[1]), model_size=model_size)
    if is_megatron(path):
        return megatron_source(path, iteration=iteration, model_size=model_size)
    if not list(path.glob("*.safetensors*")):
        raise CheckpointError(
            f"{path} is no checkpoint: it has neither {run_folder.LATEST_FILE}, as a run's folder"
            " has, nor safetensors, as one of Hugging Face's has."
        )
    if iteration is not None:
        raise CheckpointError(
            f"{path} is a Hugging Face folder, which has no steps; leave out --ckpt-step."
        )
    return hf_source(path, model_size=model_size)


def stored_weights(contents: Contents) -> list[StoredWeight]:
    """By module, then by name with layers and experts counted up."""

    def key(each: StoredWeight) -> tuple[int, list[tuple[int, str]]]:
        words = re.split(r"(\d+)", each.name)
        numbered = [(int(word) if word.isdecimal() else -1, word) for word in words]
        return _POSITIONS[each.module], numbered

    found = [
        StoredWeight(name=name, module=_module_of(name, contents), info=info)
        for name, info in contents.stored.items()
    ]
    return sorted(found, key=key)


def matching(names: Iterable[str], pattern: str | None) -> list[str]:
    """Names in which a glob is found somewhere, in their order; all where there is no pattern."""
    return [name for name in names if pattern is None or fnmatchcase(name, f"*{pattern}*")]


def _module_of(stored_name: str, contents: Contents) -> str:
    if stored_name.startswith(f"{OPTIMIZER}."):
        return OPTIMIZER
    name = contents.rows.get(stored_name, "")
    return next((module for module, pattern in _MODULES if re.match(pattern, name)), UNMAPPED)
