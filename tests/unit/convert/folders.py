"""What the tests of conversions share beside tests/tensor_files.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

from megatron_vico.config.registry import ModelConfig
from tests.tensor_files import read_all

Tensors = dict[str, Tensor]


class MakeFolder(Protocol):
    """Gives a toy's folder: a layout's, or a run's where the form is `megatron`."""

    def __call__(self, model: str | ModelConfig, form: str = "flash") -> Path: ...


def changed_copy(
    folder: Path,
    target: Path,
    *,
    tensors: Callable[[Tensors], object] = lambda tensors: None,
    config: Callable[[dict[str, Any]], object] = lambda config: None,
) -> Path:
    """A Hugging Face folder in one file, with other tensors or another config.json."""
    changed, contents = read_all(folder), json.loads((folder / "config.json").read_text())
    tensors(changed)
    config(contents)
    target.mkdir()
    save_file(changed, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(contents))
    return target
