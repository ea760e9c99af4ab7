"""Folders in Hugging Face's form: safetensors with or without an index, JSON files, and files that travel along."""

import contextlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_vico.errors import CheckpointError

INCOMPLETE_SUFFIX = ".incomplete"
"""Of a folder that is still being written, or whose writer was killed; every reader refuses it."""

MAX_SHARD_BYTES = 5_000_000_000
"""Size of a safetensors file above which a checkpoint is cut into several, as transformers does."""

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a safetensors folder that has not been read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name, such as BF16."""


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
        file = self.tensors[name].file
        with _readable(file), safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name)


def open_folder(path: str | Path) -> SafetensorsFolder:
    """Open a checkpoint folder and check that it is whole.

    Args:
        path: folder with model.safetensors, or with shards and an index.

    Returns:
        The folder; nothing but headers has been read.

    Raises:
        CheckpointError: if it is unfinished, has no weights, lacks a shard, or a file is cut short or not safetensors.
    """
    folder = Path(path)
    refuse_incomplete(folder)
    index_path = folder / _INDEX
    if index_path.exists():
        weight_map: dict[str, str] = read_json(index_path).get("weight_map") or {}
        files = sorted({folder / name for name in weight_map.values()})
        absent = [file.name for file in files if not file.exists()]
        if absent:
            raise CheckpointError(f"{index_path} names {listed(absent)}, absent from the folder; copy them again.")
    else:
        files = [folder / _SINGLE]
        if not files[0].exists():
            raise CheckpointError(f"{folder}: neither {_SINGLE} nor {_INDEX} is there; this is no safetensors folder.")
        weight_map = {}
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        tensors |= _read_header(file)
    lost = [name for name, file in weight_map.items() if name not in tensors or tensors[name].file.name != file]
    if lost:
        raise CheckpointError(f"{index_path} promises tensors that its files do not hold: {listed(lost)}.")
    return SafetensorsFolder(path=folder, tensors=tensors)


def write_folder(path: Path, *, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write tensors as safetensors; holds no more than one shard of them at a time.

    Args:
        path: an existing folder.
        tensors: names and tensors, in the order they are to be stored.
        max_shard_bytes: size above which a new file begins; a single larger tensor gets a file of its own.
    """
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        save_file(pending, path / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > max_shard_bytes:
            flush()
            pending_bytes = 0
        pending[name] = tensor.detach().to("cpu").contiguous()
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()
    if len(shards) == 1:
        (path / "shard-0.safetensors").rename(path / _SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (path / f"shard-{number}.safetensors").rename(path / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(path / _INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder that appears under its name only when all of it has been written.

    Args:
        path: where it is to be; must not exist, or be empty.

    Yields:
        A folder beside it to write to, removed if the writing fails.

    Raises:
        CheckpointError: if there is something at `path` already, or the disk cannot take it.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists already and is not empty; remove it, or write to another folder.")
    unfinished = target.with_name(target.name + INCOMPLETE_SUFFIX)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        os.replace(unfinished, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(f"could not write {target}: {error}; nothing is left of it.") from error
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def refuse_incomplete(folder: Path) -> None:
    """Raise CheckpointError if there is no such folder, or its writer never finished."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder.")
    if folder.name.endswith(INCOMPLETE_SUFFIX):
        raise CheckpointError(f"{folder} was never finished; write it again.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's contents; CheckpointError if it is absent or broken."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} holds {type(contents).__name__}, expected a JSON object.")
    return contents


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write a JSON file as transformers does: indented, sorted, with a final newline."""
    path.write_text(json.dumps(contents, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


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


def _read_header(file: Path) -> dict[str, StoredTensor]:
    # The header alone, checked against the file's size: safetensors itself would map the whole file first.
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        header_len = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + header_len > size:
            raise CheckpointError(f"{file} is cut short or not a safetensors file ({size} bytes); copy it again.")
        try:
            header = json.loads(stream.read(header_len))
        except ValueError as error:
            raise CheckpointError(f"{file} is not a safetensors file: {error}.") from error
    header.pop("__metadata__", None)
    tensors: dict[str, StoredTensor] = {}
    end = 0
    for name, entry in header.items():
        shape = tuple(entry["shape"])
        start_byte, end_byte = entry["data_offsets"]
        if math.prod(shape) * _DTYPE_BYTES.get(entry["dtype"], 0) != end_byte - start_byte:
            found = f"{shape} of {entry['dtype']} in {end_byte - start_byte} bytes"
            raise CheckpointError(f"{file}: tensor {name!r} is said to be {found}, which does not fit.")
        end = max(end, end_byte)
        tensors[name] = StoredTensor(file=file, shape=shape, dtype=entry["dtype"])
    if size != 8 + header_len + end:
        raise CheckpointError(f"{file} has {size} bytes, its header says {8 + header_len + end}; copy it again.")
    return tensors


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"could not read {file}: {error}.") from error


def listed(names: Iterable[str], *, most: int = 10) -> str:
    """Names for an error message, the first few of them; `none` where there are none."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def dtype_name(tensor: Tensor) -> str:
    """The name config.json uses for a tensor's format, such as bfloat16."""
    return str(tensor.dtype).removeprefix("torch.")


def as_dtype(name: str) -> torch.dtype:
    """The format of that name in `--dtype`."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
