"""Opens folders as sources: Hugging Face's in any layout, and Megatron checkpoints.

Headers and metadata are read, no tensor. What is wrong with a folder's tensors is listed in the
source (`Source.problems`), for people to inspect; `open_source` raises it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_vico import files
from megatron_vico.checkpoint import run_folder
from megatron_vico.config.config_json import read_model
from megatron_vico.config.registry import ModelConfig
from megatron_vico.config.stages import MODULES
from megatron_vico.convert.huggingface.config import layout_of
from megatron_vico.convert.huggingface.safetensors_folder import (
    SafetensorsFolder,
    StoredTensor,
    open_folder,
)
from megatron_vico.convert.megatron.reader import open_dcp
from megatron_vico.convert.names.internvl import Entry, entries
from megatron_vico.convert.names.kinds import PaddedVocabulary
from megatron_vico.convert.options import Layout
from megatron_vico.convert.source import (
    Contents,
    Source,
    TensorInfo,
    check_whole,
    dtype_name,
    problems_of,
    problems_with,
    wrong_shapes,
)
from megatron_vico.errors import CheckpointError

TOKENIZER_FOLDER = "tokenizer"
"""In a converted Megatron checkpoint: the tokenizer that came with the weights."""

OPTIMIZER = "optimizer"
"""First part of the names of an optimizer's state and of its copies of the weights."""

_MODULE_NAMES = (
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^model\.(?=vision_tower\.|multi_modal_projector\.)"), ""),
)

_FORMATS = (torch.bfloat16, torch.float16, torch.float32)


def is_megatron(folder: Path) -> bool:
    """Whether a folder is a run's, in megatron-core's form."""
    return (folder / run_folder.LATEST_FILE).exists() or bool(run_folder.finished_steps(folder))


def open_source(
    path: str | Path,
    *,
    model_size: str | None = None,
    layout: Layout | None = None,
    iteration: int | None = None,
) -> Source:
    """As `open_checkpoint`, but CheckpointError if the source lists a problem."""
    opened = open_checkpoint(path, model_size=model_size, layout=layout, iteration=iteration)
    return check_whole(opened)


def open_checkpoint(
    directory: str | Path,
    *,
    model_size: str | None = None,
    layout: Layout | None = None,
    iteration: int | None = None,
) -> Source:
    """A folder as a source; problems with its tensors are listed in it rather than raised.

    Args:
        directory: a run's folder, one of its iter_ folders, or a Hugging Face folder.
        model_size: the size it should be; unset, the one it says it is.
        layout: a Hugging Face folder's should be; unset, any.
        iteration: which step of a run; unset, the latest.

    Raises:
        CheckpointError: if there is no checkpoint, it is unfinished or cannot be read, or of
            another size or layout.
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
    return hf_source(path, model_size=model_size, layout=layout)


def hf_source(
    path: str | Path, *, model_size: str | None = None, layout: Layout | None = None
) -> Source:
    """A Hugging Face folder, its layout and size found from config.json; see `open_checkpoint`."""
    folder = _with_saved_names(open_folder(path))
    config_path = folder.path / "config.json"
    config = files.read_json(config_path)
    found = layout_of(config, path=str(config_path), tensors=folder.tensors.keys())
    if layout not in (None, found):
        raise CheckpointError(
            f"{folder.path} has the {found} layout, expected {layout}; give --layout {found}, or"
            " none."
        )
    model = read_model(config, path=str(config_path), expected=model_size)
    source = files_source(folder, model=model, layout=found)
    assert source.trained is not None
    drawn = config.get("untrained_modules") or ()
    return replace(source, trained=tuple(name for name in source.trained if name not in drawn))


def _with_saved_names(folder: SafetensorsFolder) -> SafetensorsFolder:
    """The `hf` layout's names as transformers saves them, where they are those of its modules.

    transformers 4.52 wrote those, and gathers of FSDP and ZeRO still do, with `module.` before all
    of them or what torch.compile adds.
    """
    tensors = dict(folder.tensors)
    for wrapper in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): each for name, each in tensors.items()}
    if any(name.startswith("model.language_model.") for name in tensors):
        for pattern, saved in _MODULE_NAMES:
            tensors = {pattern.sub(saved, name): each for name, each in tensors.items()}
    return replace(folder, tensors=tensors)


def files_source(
    folder: SafetensorsFolder, *, model: ModelConfig, layout: Layout, without: Sequence[str] = ()
) -> Source:
    """Tensors of known size and layout as a source; needs no config.json.

    `without`: beginnings of the table's names that the folder lacks beyond what the layout lacks,
    such as `initial.CONNECTOR_4X` where a vision tower and a language model come apart.
    """
    rows = {
        name: row
        for name, row in entries(model, layout=layout).items()
        if row.files and not name.startswith(tuple(without))
    }
    owners = {file: name for name, row in rows.items() for file in row.files}
    tensors: dict[str, TensorInfo] = {}
    wrong: list[str] = []
    used: set[str] = set()
    for name, row in rows.items():
        unfit = list(_unfit(row, folder.tensors))
        wrong += unfit
        if not unfit and all(file in folder.tensors for file in row.files):
            dtype = folder.tensors[row.files[0]].dtype
            tensors[name] = TensorInfo(shape=row.shape, dtype=dtype)
            used |= set(row.files)
    # Files of a row that cannot be put together, and files of no row.
    single = sorted(folder.tensors.keys() - used)

    def read_tensor(name: str) -> Tensor:
        if name not in rows:
            return folder.read_tensor(name)
        return rows[name].kind.to_megatron([folder.read_tensor(file) for file in rows[name].files])

    return Source(
        model=model,
        where=f"{folder.path} ({layout} layout of {model.name})",
        tensors=tensors | {name: folder.tensors[name] for name in single},
        read_tensor=read_tensor,
        problems=problems_of(folder.tensors, owners, wrong),
        companions=folder.path,
        layout=layout,
        trained=tuple(
            module
            for module in MODULES
            if any(name.removeprefix("encoder.").startswith(f"{module}.") for name in tensors)
        ),
        contents=Contents(
            path=folder.path,
            facts={"model_size": model.name, "layout": layout},
            stored=folder.tensors,
            rows=owners,
        ),
    )


def megatron_source(
    path: str | Path, *, model_size: str | None = None, iteration: int | None = None
) -> Source:
    """The weights of a run's checkpoint, saved under whatever layout; see `open_checkpoint`."""
    folder = run_folder.find_iteration(path, iteration)
    metadata = run_folder.read_metadata(path, iteration)
    model = run_folder.model_of_run(path, iteration=iteration, expected=model_size)
    stored = open_dcp(folder)
    rows = entries(model, layout="flash")
    names = [name for name in stored.tensors if not name.startswith(f"{OPTIMIZER}.")]
    unknown = sorted(set(names) - set(rows))
    tensors = {
        name: _unpadded(rows.get(name), stored.tensors[name])
        for name in (*(name for name in rows if name in stored.tensors), *unknown)
    }
    optimizer = f" ({metadata.optimizer})" if metadata.optimizer else ""

    def read_tensor(name: str) -> Tensor:
        tensor = stored.read_tensor(name)
        padded = tuple(tensor.shape) != tensors[name].shape
        return tensor[: tensors[name].shape[0]] if padded else tensor

    return Source(
        model=model,
        where=f"{folder} (Megatron checkpoint of {model.name})",
        tensors=tensors,
        read_tensor=read_tensor,
        problems=problems_with(tensors, rows),
        companions=Path(path) / TOKENIZER_FOLDER,
        trained=metadata.trained,
        contents=Contents(
            path=folder,
            facts={
                "model_size": model.name,
                "stage": metadata.stage,
                "trained": "unknown" if metadata.trained is None else ", ".join(metadata.trained),
                "iteration": str(metadata.iteration),
                "layout": metadata.layout or "unknown",
                "has_optimizer": f"{metadata.has_optimizer}{optimizer}",
            },
            stored=stored.tensors,
            rows={name: name for name in rows},
        ),
    )


def _unpadded(row: Entry | None, stored: TensorInfo) -> TensorInfo:
    """A stored tensor without the rows that pad a vocabulary for the ranks that wrote it."""
    shape = stored.shape
    if row is not None and isinstance(row.kind, PaddedVocabulary) and shape[0] > row.shape[0]:
        shape = (row.shape[0], *shape[1:])
    return TensorInfo(shape=shape, dtype=stored.dtype)


def _unfit(row: Entry, stored: Mapping[str, StoredTensor]) -> Iterator[str]:
    """Why file tensors cannot be made into the row's tensor, a clause for each reason."""
    found = {name: stored[name] for name in row.files if name in stored}
    for clause in wrong_shapes(found, dict(zip(row.files, row.file_shapes, strict=True))):
        yield f"{found[clause.split()[0]].file}: {clause}"
    formats = {name: dtype_name(each.dtype) for name, each in found.items()}
    listed_formats = ", ".join(f"{name} is {each}" for name, each in formats.items())
    if len(set(formats.values())) > 1:
        yield f"{listed_formats}; tensors that Megatron joins need one format"
    elif not {each.dtype for each in found.values()} <= set(_FORMATS):
        yield f"{listed_formats}, expected bfloat16, float16 or float32"
