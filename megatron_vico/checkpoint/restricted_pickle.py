"""Megatron checkpoints hold pickles: only the few classes that belong there are ever unpickled.

torch's reader unpickles `.metadata` and the byte objects of `.distcp` files without limits, and
TransformerEngine its own extra state, so that a stranger's checkpoint could run any program. Each
is read here first; what else it names is refused by that name.
"""

import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import torch
from megatron.core.safe_globals import SafeUnpickler
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_vico.errors import CheckpointError
from megatron_vico.files import open_plain, read_json, read_plain

_METADATA, _COMMON, _BACKEND = ".metadata", "common.pt", "metadata.json"

_OF_DCP = "torch.distributed.checkpoint"
_KNOWN = {
    f"{_OF_DCP}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_OF_DCP}.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata", "TensorProperties"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    f"{_OF_DCP}.planner": {
        *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    },
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePath", "PurePosixPath"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_format = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_format and name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which does not belong there")
        # Python 3.13 moved its paths.
        return super().find_class(module.removesuffix("._local"), name)


def read_metadata(folder: Path) -> Metadata:
    """`.metadata` of a step's folder, which says where each tensor lies.

    CheckpointError if it is absent or damaged, or names a class that does not belong there.
    """
    path = folder / _METADATA
    try:
        with open_plain(path) as file:
            metadata: Metadata = _Unpickler(file).load()
        _check_types(metadata)
    except Exception as error:  # damaged bytes raise almost anything
        raise _refused(path, error) from error
    return metadata


def check_objects(folder: Path) -> None:
    """Read all of a step's folder that is no tensor as torch and megatron-core will, within limits.

    CheckpointError as of `read_metadata`.
    """
    if not isinstance(read_json(folder / _BACKEND).get("sharded_backend"), str):
        raise CheckpointError(f"{folder / _BACKEND} names no sharded_backend; copy it again.")
    metadata = read_metadata(folder)
    for key, stored in metadata.state_dict_metadata.items():
        if not isinstance(stored, BytesStorageMetadata):
            continue
        place = metadata.storage_data[MetadataIndex(key)]
        path = folder / place.relative_path
        try:
            with open_plain(path) as file:
                file.seek(place.offset)
                _check_object(file.read(place.length), is_extra_state="_extra_state" in key)
        except Exception as error:
            raise _refused(path, error, of=f", object {key!r}") from error
    if (folder / _COMMON).exists():
        try:
            _check_object(read_plain(folder / _COMMON), is_extra_state=False)
        except Exception as error:
            raise _refused(folder / _COMMON, error) from error


def _check_object(content: bytes, *, is_extra_state: bool) -> None:
    loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    for state in _pickled_inside(loaded) if is_extra_state else ():
        SafeUnpickler(io.BytesIO(state)).load()


def _pickled_inside(value: Any) -> Iterator[bytes]:
    """TransformerEngine's extra state: a pickle as bytes, or as a tensor of them."""
    if isinstance(value, io.BytesIO):
        yield value.getvalue()
    elif isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.numel():
        yield value.numpy().tobytes()
    elif isinstance(value, dict):
        for each in value.values():
            yield from _pickled_inside(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _pickled_inside(each)


def _check_types(metadata: Any) -> None:
    """Whatever stands in the place of names, sizes and offsets is met here, not by torch."""
    if not isinstance(metadata, Metadata):
        raise TypeError(f"it holds {type(metadata).__name__}")
    places: Any = metadata.storage_data
    for index, place in places.items():
        if not isinstance(index, MetadataIndex) or not isinstance(place, _StorageInfo):
            raise TypeError(f"{index!r} is at {place!r}")
        name, numbers = place.relative_path, (place.offset, place.length)
        if not isinstance(name, str) or PurePath(name).name != name:
            raise ValueError(f"{name!r} is no file of the folder")
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"{index.fqn} is at {numbers}")
    for key, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, BytesStorageMetadata):
            parts = [MetadataIndex(key)]
        elif isinstance(stored, TensorStorageMetadata):
            if not isinstance(stored.properties.dtype, torch.dtype):
                raise TypeError(f"{key} has format {stored.properties.dtype!r}")
            chunks = stored.chunks
            if not all(_is_chunk(chunk, dims=len(stored.size)) for chunk in chunks):
                raise ValueError(f"{key} has chunks of other dimensions")
            parts = [MetadataIndex(key, chunk.offsets) for chunk in chunks]
        else:
            raise TypeError(f"{key!r} is {type(stored).__name__}")
        if not all(part in places for part in parts):
            raise KeyError(f"it does not say where {key} lies")


def _is_chunk(chunk: Any, *, dims: int) -> bool:
    return isinstance(chunk, ChunkStorageMetadata) and all(
        isinstance(sizes, torch.Size) and len(sizes) == dims
        for sizes in (chunk.offsets, chunk.sizes)
    )


def _refused(path: Path, error: Exception, *, of: str = "") -> CheckpointError:
    # torch says it in twenty lines.
    found = re.search(r"(?:GLOBAL |class ')([\w.]+)", str(error))
    what = f"it names {found[1]}, which does not belong there" if found else None
    cause = what or (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return CheckpointError(
        f"could not read {path}{of}, not a readable checkpoint: {cause}; copy the folder again,"
        " from a source that you trust."
    )
