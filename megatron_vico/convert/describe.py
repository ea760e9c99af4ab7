"""What a checkpoint folder holds, Megatron's or Hugging Face's, from headers and metadata alone."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megatron_vico.convert.open import OPTIMIZER
from megatron_vico.convert.source import Contents, TensorInfo

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
