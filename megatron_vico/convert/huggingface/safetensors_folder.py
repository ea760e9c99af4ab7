"""Folders of safetensors, with or without an index: read by the library, written as it does.

The library writes only what is in memory whole, 5 GB a file: that is slower than a copy by half,
where writing tensor by tensor keeps up with one. So the writing is done here.
"""

import json
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_vico.checkpoint.integrity import Sum, SummedFile
from megatron_vico.convert.options import MAX_SHARD_BYTES
from megatron_vico.convert.source import TensorInfo
from megatron_vico.convert.write_behind import write_behind
from megatron_vico.errors import CheckpointError, listed
from megatron_vico.files import open_plain, read_json, refuse_incomplete, write_json

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class StoredTensor(TensorInfo):
    """A tensor of a safetensors file that has not been read."""

    file: Path
    name: str
    """In the file."""


Group = dict[str, TensorInfo]
"""Tensors that are made from one another and so written together, by name."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A safetensors file that is to be written."""

    file: str
    groups: tuple[Group, ...]

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        return sum(info.num_bytes for group in self.groups for info in group.values())


@dataclass(frozen=True, kw_only=True)
class SafetensorsFolder:
    """Tensors by name, of which only the headers of their files have been read."""

    path: Path
    tensors: dict[str, StoredTensor]

    def read_tensor(self, name: str) -> Tensor:
        """One of `tensors`, as stored; CheckpointError if its file cannot be read."""
        stored = self.tensors[name]
        try:
            # Read, not mapped: mapped pages count as this process's memory, and a file that was cut
            # short meanwhile would kill it.
            with safe_open(stored.file, framework="pt", backend="pread") as opened:
                tensor: Tensor = opened.get_tensor(stored.name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"could not read {stored.name!r} from {stored.file}: {error}; copy it again."
            ) from error
        return tensor


def open_folder(path: str | Path) -> SafetensorsFolder:
    """Open a folder with model.safetensors, or with shards and an index; check that it is whole.

    CheckpointError if it is unfinished, has no weights, lacks a shard, or a file is cut short.
    """
    folder = Path(path)
    refuse_incomplete(folder)
    index_path, single = folder / _INDEX, folder / _SINGLE
    weight_map: dict[str, str] = {}
    paths = [single]
    if index_path.exists():
        weight_map = _weight_map(index_path)
        paths = sorted({folder / name for name in weight_map.values()})
        absent = [path.name for path in paths if not path.exists()]
        if absent:
            raise CheckpointError(
                f"{index_path} names {listed(absent)}, absent from the folder; copy them again."
            )
        if single.exists() and single not in paths:
            # transformers would load the single file, whatever the index says.
            raise CheckpointError(
                f"{folder} has two sets of weights, {_SINGLE} and those of {_INDEX}; remove one."
            )
    elif not single.exists():
        raise CheckpointError(
            f"{folder}: neither {_SINGLE} nor {_INDEX} is there; this is no safetensors folder."
        )
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        found = _read_header(path)
        twice = found.keys() & tensors.keys()
        if twice:
            others = {tensors[name].file.name for name in twice}
            raise CheckpointError(
                f"{path} holds tensors that {listed(others)} holds too: {listed(twice)}."
            )
        tensors |= found
    lost = [
        name
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].file.name != file
    ]
    if lost:
        raise CheckpointError(
            f"{index_path} promises tensors that its files do not hold: {listed(lost)}."
        )
    return SafetensorsFolder(path=folder, tensors=tensors)


def plan_shards(groups: Iterable[Group], *, max_shard_bytes: int = MAX_SHARD_BYTES) -> list[Shard]:
    """Which tensors go to which file, known before any of them is read; at least one file.

    No group is cut, as huggingface_hub's planner would; above `max_shard_bytes` a new file begins,
    and a single larger group gets one of its own.
    """
    cut: list[list[Group]] = [[]]
    pending_bytes = 0
    for group in groups:
        num_bytes = sum(info.num_bytes for info in group.values())
        if cut[-1] and pending_bytes + num_bytes > max_shard_bytes:
            cut.append([])
            pending_bytes = 0
        cut[-1].append(group)
        pending_bytes += num_bytes
    names = [f"model-{number + 1:05d}-of-{len(cut):05d}.safetensors" for number in range(len(cut))]
    return [
        # Wide formats first: readers want a tensor's bytes to begin at a multiple of its item size.
        Shard(file=name, groups=tuple(sorted(groups, key=_item_size, reverse=True)))
        for name, groups in zip([_SINGLE] if len(cut) == 1 else names, cut, strict=True)
    ]


def write_shard(
    folder: Path,
    shard: Shard,
    *,
    make: Callable[[Group], Sequence[Tensor]],
    written: Callable[[int], object],
) -> Sum:
    """Write one file: a length, a JSON header and the bytes; one group while the next is made.

    Args:
        make: called group by group, gives the tensors in the group's order.
        written: called with the bytes of each group when they are written.

    Returns:
        The file's checksum.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for group in shard.groups:
        for name, info in group.items():
            start, end = end, end + info.num_bytes
            header[name] = {
                "dtype": _DTYPE_NAMES[info.dtype],
                "shape": info.shape,
                "data_offsets": (start, end),
            }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream = SummedFile(folder / shard.file)
    stream.write(struct.pack("<Q", len(text)) + text)
    with write_behind() as behind:
        for group in shard.groups:
            behind(partial(_write_group, stream, group, make(group), written))
    return stream.close()


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write the file that says which tensor is where; a single file needs none."""
    if len(shards) > 1:
        weight_map = {
            name: shard.file for shard in shards for group in shard.groups for name in group
        }
        total_bytes = sum(shard.num_bytes for shard in shards)
        write_json(
            folder / _INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        )


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise CheckpointError(
            f"{path}: weight_map is no table of tensors and files of this folder; copy it again."
        )
    return weight_map


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file; the library has checked that they are all of it and do not overlap."""
    try:
        open_plain(file).close()
        with safe_open(file, framework="pt", backend="pread") as opened:
            slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
            facts = {name: (each.get_shape(), each.get_dtype()) for name, each in slices.items()}
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} ({file.stat().st_size} bytes) is cut short or not a safetensors file: {error};"
            " copy it again."
        ) from error
    except OSError as error:
        raise CheckpointError(f"could not read {file}: {error}.") from error
    for name, (_, dtype) in facts.items():
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{file}: tensor {name!r} has format {dtype}; known are {', '.join(_DTYPES)}."
            )
    return {
        name: StoredTensor(file=file, name=name, shape=tuple(shape), dtype=_DTYPES[dtype])
        for name, (shape, dtype) in facts.items()
    }


def _write_group(
    stream: SummedFile, group: Group, tensors: Sequence[Tensor], written: Callable[[int], object]
) -> None:
    for (name, info), tensor in zip(group.items(), tensors, strict=True):
        assert (tuple(tensor.shape), tensor.dtype) == (info.shape, info.dtype), name
        contents = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        stream.write(memoryview(contents.numpy()))
    written(sum(info.num_bytes for info in group.values()))


def _item_size(group: Group) -> int:
    return max(info.dtype.itemsize for info in group.values())
