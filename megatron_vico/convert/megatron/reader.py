"""The tensors of a Megatron checkpoint of any parallel layout, one at a time, by the table's names.

megatron-core stores a layer's parameter of all layers under one key, as one tensor with a leading
dimension for the layer (and a second one for the expert), cut into chunks by the ranks that wrote
it. Here each layer's part is a tensor of its own again, and reading one reads no more than the
chunks it lies in: no process groups, no model, one process.
"""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata as Chunk
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from megatron_vico.checkpoint.restricted_pickle import read_metadata
from megatron_vico.convert.source import TensorInfo
from megatron_vico.errors import CheckpointError, listed

Index = tuple[int, ...]

_FAILURES = (
    *(OSError, CheckpointException, RuntimeError, UnpicklingError, EOFError, ValueError),
    *(AssertionError, LookupError, TypeError),  # of files that are not what .metadata says
)

_STACKED = re.compile(r"\.layers\.(?!\d)")
_STACKED_EXPERTS = re.compile(r"\.mlp\.experts\.experts\.")


@dataclass(frozen=True, kw_only=True)
class DcpTensor(TensorInfo):
    """A tensor that has not been read, without the dimensions that megatron-core added."""

    key: str
    """megatron-core's, shared by all layers and experts."""

    index: Index
    """Where it is in the added dimensions: (), (layer,) or (layer, expert)."""

    chunks: tuple[Chunk, ...]
    """What it was cut into, in the coordinates of the key's tensor."""


@dataclass(frozen=True, kw_only=True)
class DcpFolder:
    """The tensors of one step's folder by name; only its metadata has been read."""

    path: Path
    tensors: dict[str, DcpTensor]
    """By the table's name, or `optimizer.state.KIND.` and that; vocabularies padded as saved."""

    metadata: Metadata

    def read_tensor(self, name: str) -> Tensor:
        """One of `tensors`, as stored; CheckpointError if a file is absent or cut short."""
        wanted = self.tensors[name]
        target = torch.empty(wanted.shape, dtype=wanted.dtype)
        items = [_read_item(wanted.key, chunk, wanted.index) for chunk in wanted.chunks]
        reader = FileSystemReader(self.path)
        try:
            reader.set_up_storage_reader(self.metadata, is_coordinator=True)
            stacked = target.view((1,) * len(wanted.index) + wanted.shape)
            reader.read_data(LoadPlan(items), _Into(stacked)).wait()
        except _FAILURES as error:
            raise CheckpointError(
                f"could not read {name} from {self.path}: {error}; copy the folder again."
            ) from error
        return target


def open_dcp(path: str | Path) -> DcpFolder:
    """Open one step's folder of a run, which holds .metadata and the .distcp files.

    CheckpointError if one cannot be read or is cut short, or a tensor is not stored whole.
    """
    folder = Path(path)
    metadata = read_metadata(folder)
    _check_files(folder, metadata)
    tensors: dict[str, DcpTensor] = {}
    for key, stored in metadata.state_dict_metadata.items():
        # TransformerEngine's `_extra_state` holds no weights.
        if isinstance(stored, TensorStorageMetadata) and not key.endswith("_extra_state"):
            tensors |= dict(_tensors_of(key, stored, folder))
    return DcpFolder(path=folder, tensors=tensors, metadata=metadata)


def _check_files(folder: Path, metadata: Metadata) -> None:
    """Compare the files with what the metadata says of them, before hours are spent on reading."""
    sizes: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        sizes[stored.relative_path] = max(
            sizes.get(stored.relative_path, 0), stored.offset + stored.length
        )
    absent = [name for name in sizes if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"{folder} lacks {listed(absent)}, which its .metadata names; copy the folder again."
        )
    short = [name for name, size in sizes.items() if (folder / name).stat().st_size < size]
    if short:
        raise CheckpointError(f"{folder}: {listed(short)} cut short; copy the folder again.")


class _Into(DefaultLoadPlanner):
    """Hands the reader the part of a tensor that a chunk goes to."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._target
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do: the reader has copied into the target."""


def _tensors_of(
    key: str, stored: TensorStorageMetadata, folder: Path
) -> Iterator[tuple[str, DcpTensor]]:
    num_leading = _num_leading(key)
    size = tuple(stored.size)
    shape = size[num_leading:]
    by_index = _chunks_by_index(stored.chunks, num_leading)
    for index in itertools.product(*map(range, size[:num_leading])):
        name = _unstacked(key, index)
        chunks = by_index.get(index, [])
        held = sum(math.prod(chunk.sizes[num_leading:]) for chunk in chunks)
        if held != math.prod(shape):
            raise CheckpointError(
                f"{folder} holds {held} of the {math.prod(shape)} numbers of {name}; a rank's part"
                " was never written."
            )
        dtype = stored.properties.dtype
        yield (
            name,
            DcpTensor(key=key, index=index, shape=shape, dtype=dtype, chunks=tuple(chunks)),
        )


def _chunks_by_index(chunks: Sequence[Chunk], num_leading: int) -> dict[Index, list[Chunk]]:
    # Once for all: to search a key's chunks for each of its tensors is 3e8 steps with 94 layers of
    # 128 experts.
    found: dict[Index, list[Chunk]] = {}
    for chunk in chunks:
        spans = [
            range(start, start + length)
            for start, length in zip(chunk.offsets, chunk.sizes, strict=True)
        ]
        for index in itertools.product(*spans[:num_leading]):
            found.setdefault(index, []).append(chunk)
    return found


def _num_leading(key: str) -> int:
    if not _STACKED.search(key):
        return 0
    return 2 if _STACKED_EXPERTS.search(key) else 1


def _unstacked(key: str, index: Index) -> str:
    """The table's name: the key with the layer's and the expert's number in it."""
    for number, stacked in zip(index, (_STACKED, _STACKED_EXPERTS), strict=False):
        key = stacked.sub(rf"\g<0>{number}.", key)
    return key


def _read_item(key: str, chunk: Chunk, index: Index) -> ReadItem:
    num_leading = len(index)
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=MetadataIndex(key, chunk.offsets),
        dest_offsets=torch.Size((0,) * num_leading + tuple(chunk.offsets[num_leading:])),
        storage_index=MetadataIndex(key, chunk.offsets),
        storage_offsets=torch.Size(
            [wanted - start for wanted, start in zip(index, chunk.offsets, strict=False)]
            + [0] * (len(chunk.sizes) - num_leading)
        ),
        lengths=torch.Size((1,) * num_leading + tuple(chunk.sizes[num_leading:])),
    )
