"""Folders in Hugging Face's form: safetensors with or without an index, JSON files, and files that
travel along."""

import contextlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeGuard

import torch
from torch import Tensor

from megatron_vico.convert.ranks import FAILURES, Ranks
from megatron_vico.convert.write_behind import WriteBehind
from megatron_vico.errors import CheckpointError, cause_of, listed
from megatron_vico.files import read_json, refuse_incomplete, unfinished_path, write_json

MAX_SHARD_BYTES = 5_000_000_000
"""Size of a safetensors file above which a checkpoint is cut into several, as transformers does."""

TOKENIZER_FILES = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
    ),
    *(
        "merges.txt",
        "tokenizer.model",
        "sentencepiece.model",
        "chat_template.jinja",
        "chat_template.json",
    ),
)

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
class StoredTensor:
    """A tensor of a safetensors folder that has not been read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name, such as BF16."""

    start: int
    """Where its bytes begin in the file."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its format."""
        return _DTYPES[self.dtype]

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.torch_dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class TensorForm:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


Group = dict[str, TensorForm]
"""Tensors that are made from one another and so written together, by name."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A safetensors file that is to be written."""

    file: str
    groups: tuple[Group, ...]

    @property
    def num_bytes(self) -> int:
        """Of its tensors."""
        return sum(form.num_bytes for group in self.groups for form in group.values())


@dataclass(frozen=True, kw_only=True)
class SafetensorsFolder:
    """The tensors of a folder by name; only headers have been read."""

    path: Path
    tensors: dict[str, StoredTensor]

    def read(self, name: str) -> Tensor:
        """One tensor.

        Args:
            name: a key of `tensors`.

        Returns:
            It, as stored.
        """
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=stored.torch_dtype)
        # Read, not mapped: mapped pages count as this process's memory, and each costs a fault.
        remaining = memoryview(_bytes_of(tensor).numpy())
        try:
            with stored.file.open("rb", buffering=0) as stream:
                stream.seek(stored.start)
                while len(remaining):
                    num_read = stream.readinto(remaining)
                    if not num_read:
                        raise CheckpointError(
                            f"{stored.file} ends within tensor {name!r}; copy it again."
                        )
                    remaining = remaining[num_read:]
        except OSError as error:
            raise CheckpointError(
                f"could not read {name!r} from {stored.file}: {error}."
            ) from error
        return tensor


def open_folder(path: str | Path) -> SafetensorsFolder:
    """Open a checkpoint folder and check that it is whole.

    Args:
        path: folder with model.safetensors, or with shards and an index.

    Returns:
        The folder; nothing but headers has been read.

    Raises:
        CheckpointError: if it is unfinished, has no weights, lacks a shard, or a file is cut short
            or not safetensors.
    """
    folder = Path(path)
    refuse_incomplete(folder)
    index_path = folder / _INDEX
    if index_path.exists():
        weight_map = _weight_map(index_path)
        files = sorted({folder / name for name in weight_map.values()})
        absent = [file.name for file in files if not file.exists()]
        if absent:
            raise CheckpointError(
                f"{index_path} names {listed(absent)}, absent from the folder; copy them again."
            )
        if (folder / _SINGLE).exists() and folder / _SINGLE not in files:
            # transformers would load the single file, whatever the index says.
            raise CheckpointError(
                f"{folder} has two sets of weights, {_SINGLE} and those of {_INDEX}; remove one."
            )
    else:
        files = [folder / _SINGLE]
        if not files[0].exists():
            raise CheckpointError(
                f"{folder}: neither {_SINGLE} nor {_INDEX} is there; this is no safetensors folder."
            )
        weight_map = {}
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        found = _read_header(file)
        twice = [name for name in found if name in tensors]
        if twice:
            others = {tensors[name].file.name for name in twice}
            raise CheckpointError(
                f"{file} holds tensors that {listed(others)} holds too: {listed(twice)}."
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
    """Which tensors go to which file, known before any of them is read.

    Args:
        groups: in the order they are to be stored.
        max_shard_bytes: size above which a new file begins; a single larger group gets a file of
            its own.

    Returns:
        The files, at least one.
    """
    cut: list[list[Group]] = [[]]
    pending_bytes = 0
    for group in groups:
        num_bytes = sum(form.num_bytes for form in group.values())
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
) -> None:
    """Write one file; holds no more than two groups' tensors at a time, one written while the next
    is made.

    The safetensors library writes only what is in memory whole; the format is a length, a JSON
    header and the bytes.

    Args:
        folder: an existing folder.
        shard: from `plan_shards`.
        make: called group by group, gives the tensors in the group's order.
        written: called with the bytes of each group when they are written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for group in shard.groups:
        for name, form in group.items():
            start, end = end, end + form.num_bytes
            header[name] = {
                "dtype": _DTYPE_NAMES[form.dtype],
                "shape": form.shape,
                "data_offsets": (start, end),
            }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with (folder / shard.file).open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        with WriteBehind() as behind:
            for group in shard.groups:
                behind(partial(_write_group, stream, group, make(group), written))
        stream.flush()
        os.fsync(stream.fileno())


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


def write_folder(
    path: Path, *, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write tensors that are in memory as safetensors.

    Args:
        path: an existing folder.
        tensors: names and tensors, in the order they are to be stored.
        max_shard_bytes: see `plan_shards`.
    """
    given = dict(tensors)
    groups = [
        {name: TensorForm(shape=tuple(each.shape), dtype=each.dtype)}
        for name, each in given.items()
    ]
    shards = plan_shards(groups, max_shard_bytes=max_shard_bytes)
    for shard in shards:
        write_shard(
            path,
            shard,
            make=lambda group: [given[name] for name in group],
            written=lambda num_bytes: None,
        )
    write_index(path, shards)


@contextlib.contextmanager
def new_folder(path: str | Path, *, ranks: Ranks | None = None) -> Iterator[Path]:
    """A folder that appears under its name only when all of it has been written.

    Args:
        path: where it is to be; must not exist, or be empty.
        ranks: the processes that write it together; unset, this one alone.

    Yields:
        A folder beside it to write to, removed if the writing fails. What a killed writer has left
        there is removed first: it starts over.

    Raises:
        CheckpointError: on all ranks, if there is something at `path` already, or the disk cannot
            take it.
    """
    # Where links point: a rename can replace an empty folder, but no link to one.
    target, ranks = Path(path).resolve(), ranks or Ranks()
    unfinished = unfinished_path(target)

    def look() -> None:
        if os.path.ismount(target):
            raise CheckpointError(
                f"{target} is a mount point, which nothing can be renamed to; name a folder in it."
            )
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise CheckpointError(
                f"{target} exists already and is not empty; remove it, or write to another folder."
            )

    def begin() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    ranks.on_main(look)
    try:
        ranks.on_main(begin)
        yield unfinished
        ranks.on_main(lambda: os.replace(unfinished, target))
    except BaseException as error:
        if ranks.is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, FAILURES) and not isinstance(error, CheckpointError):
            raise CheckpointError(
                f"could not write {target}: {cause_of(error)}; nothing is left of it."
            ) from error
        raise


def copy_files(source: Path, target: Path, names: Iterable[str]) -> list[str]:
    """Copy those of the named files that are there; files already at the target are kept.

    Args:
        source: folder to copy from.
        target: folder to copy to.
        names: candidates.

    Returns:
        Names of the files copied.
    """
    present = [name for name in names if (source / name).is_file() and not (target / name).exists()]
    for name in present:
        shutil.copyfile(source / name, target / name)
    return present


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        _is_file_name(name) for name in weight_map.values()
    ):
        raise CheckpointError(
            f"{path}: weight_map is no table of tensors and files of this folder; copy it again."
        )
    return weight_map


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _read_header(file: Path) -> dict[str, StoredTensor]:
    # The header alone, checked against the file's size: safetensors itself would map the whole file
    # first.
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            header_len = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if 8 + header_len > size:
                raise CheckpointError(
                    f"{file} is cut short or not a safetensors file ({size} bytes); copy it again."
                )
            header = json.loads(stream.read(header_len))
    except OSError as error:
        raise CheckpointError(f"could not read {file}: {error}.") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}.") from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{file} is not a safetensors file: its header is no table of tensors."
        )
    header.pop("__metadata__", None)
    tensors = {
        name: _stored_tensor(entry, name=name, file=file, data_start=8 + header_len)
        for name, entry in header.items()
    }
    end = 8 + header_len
    # As the format has it, without gaps; so no byte is read twice, or by nobody.
    for each in sorted(tensors.values(), key=lambda each: (each.start, each.num_bytes)):
        if each.start != end:
            raise CheckpointError(
                f"{file}: byte {min(each.start, end)} belongs to no tensor or to two; copy it"
                " again."
            )
        end += each.num_bytes
    if size != end:
        raise CheckpointError(f"{file} has {size} bytes, its header says {end}; copy it again.")
    return tensors


def _stored_tensor(entry: Any, *, name: str, file: Path, data_start: int) -> StoredTensor:
    """An entry of a header."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (fields.get(field) for field in ("dtype", "shape", "data_offsets"))
    if not (
        isinstance(dtype, str) and _are_counts(shape) and _are_counts(offsets) and len(offsets) == 2
    ):
        raise CheckpointError(
            f"{file}: tensor {name!r} has the entry {entry!r}, which is none of safetensors."
        )
    if dtype not in _DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name!r} has format {dtype}; known are {', '.join(_DTYPES)}."
        )
    stored = StoredTensor(file=file, shape=tuple(shape), dtype=dtype, start=data_start + offsets[0])
    if stored.num_bytes != offsets[1] - offsets[0]:
        found = f"{stored.shape} of {dtype} in {offsets[1] - offsets[0]} bytes"
        raise CheckpointError(f"{file}: tensor {name!r} is said to be {found}, which does not fit.")
    return stored


def _are_counts(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _write_group(
    stream: IO[bytes], group: Group, tensors: Sequence[Tensor], written: Callable[[int], object]
) -> None:
    for (name, form), tensor in zip(group.items(), tensors, strict=True):
        assert (tuple(tensor.shape), tensor.dtype) == (form.shape, form.dtype), name
        stream.write(memoryview(_bytes_of(tensor.detach().to("cpu").contiguous()).numpy()))
    written(sum(form.num_bytes for form in group.values()))


def _item_size(group: Group) -> int:
    return max(form.dtype.itemsize for form in group.values())


def dtype_name(dtype: torch.dtype) -> str:
    """The name config.json uses for a format, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


def as_dtype(name: str) -> torch.dtype:
    """The format of that name in `--dtype`."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
