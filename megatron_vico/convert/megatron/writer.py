"""Writes a Megatron checkpoint one tensor at a time, the same as training saves of a model.

megatron-core's dist_checkpointing.save takes the whole state at once. Here torch's distributed
checkpointing gets a planner that knows keys, indices and shapes from the mapping table, and makes a
tensor when its turn to be written comes. Every layout, and both kinds of layers, read the result:
the keys are TransformerEngine's, as in training checkpoints.
"""

import io
import re
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_vico.checkpoint.integrity import Sum, SummedFile
from megatron_vico.checkpoint.ranks import Ranks
from megatron_vico.checkpoint.training_checkpoint import quiet
from megatron_vico.convert.names.internvl import Entry, entries
from megatron_vico.convert.names.kinds import GatedMLP, PaddedVocabulary
from megatron_vico.convert.source import Source, TensorInfo, dtype_name
from megatron_vico.convert.write_behind import write_behind
from megatron_vico.errors import CheckpointError

_LINEAR_IN_LAYER = re.compile(r"\.layers\..*\.linear_(qkv|proj|fc1|fc2)\.weight$")


def write_dcp(
    folder: Path,
    source: Source,
    *,
    padded_vocab_size: int,
    ranks: Ranks,
    written: Callable[[int], object],
    max_file_bytes: int,
) -> dict[str, Sum]:
    """Write all of a model's weights; called by every rank, which share the work.

    Args:
        folder: an existing, empty folder.
        written: called with the bytes of each tensor that this rank has written.
        max_file_bytes: size at which a rank begins a new file.

    Returns:
        Checksums of the files that this rank has written.

    Raises:
        CheckpointException: torch's, on all ranks, if one could not read or write.
    """
    rows = entries(source.model, layout="flash", padded_vocab_size=padded_vocab_size)
    own = ranks.share(sizes_of(source, padded_vocab_size=padded_vocab_size))
    planner = _LazyPlanner(source, list(rows.values()), own=own, is_main=ranks.is_main)
    writer = _Writer(folder, written, max_file_bytes)
    with quiet():
        dcp.save({}, storage_writer=writer, planner=planner, no_dist=ranks.size == 1)
    ranks.on_main(lambda: save_config(CheckpointingConfig("torch_dist", 1), str(folder)))
    return writer.sums


def sizes_of(source: Source, *, padded_vocab_size: int) -> list[int]:
    """Bytes of each tensor as `write_dcp` will store it, in the order of the table."""
    rows = entries(source.model, layout="flash", padded_vocab_size=padded_vocab_size)
    return [
        TensorInfo(shape=row.shape, dtype=source.tensors[row.megatron].dtype).num_bytes
        for row in rows.values()
    ]


def check_formats(source: Source) -> None:
    """CheckpointError if layers, or experts, of one Megatron tensor differ in format.

    The checkpoint notes one format a tensor, in which the others would be read: a loss that nobody
    sees.
    """
    first: dict[str, str] = {}
    for row in entries(source.model, layout="flash").values():
        other = first.setdefault(row.key, row.megatron)
        formats = [dtype_name(source.tensors[name].dtype) for name in (other, row.megatron)]
        if formats[0] != formats[1]:
            raise CheckpointError(
                f"{source.where}: {other} is {formats[0]}, {row.megatron} is {formats[1]}; a"
                " Megatron checkpoint keeps all layers of a weight in one format: give --dtype"
                " (fp32 loses nothing)."
            )


class _LazyPlanner(SavePlanner):
    """Says what is to be stored without having it."""

    def __init__(self, source: Source, rows: Sequence[Entry], *, own: range, is_main: bool) -> None:
        self._source = source
        self._objects: dict[str, Any] = {}
        self._row_of: dict[tuple[str, tuple[int, ...]], Entry] = {}
        self._items: list[WriteItem] = []
        # Two items can come from one tensor; they are neighbours, so that one is kept.
        self._latest: tuple[str, Tensor] | None = None
        if is_main:
            self._add_objects(rows)
        for number in own:
            self._add_tensor(rows[number])

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """There is no state to look at."""

    def create_local_plan(self) -> SavePlan:
        """What this rank writes."""
        return SavePlan(self._items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """What all ranks write; unchecked for overlaps, which takes minutes at 128 experts."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan as the main rank has completed it."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """Make what an item stores."""
        if write_item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save([self._objects[write_item.index.fqn]], stream)
            return stream
        assert write_item.tensor_data is not None
        assert write_item.index.offset is not None
        offset, sizes = tuple(write_item.index.offset), write_item.tensor_data.chunk.sizes
        row = self._row_of[write_item.index.fqn, offset]
        dim = len(row.index)  # in front of the rows are the layer and the expert
        rows = self._whole(row)[offset[dim] : offset[dim] + sizes[dim]]
        # torch.save stores all of the memory that a view belongs to: by way of numpy, these rows
        # are all of it.
        memory = rows.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
        return torch.from_numpy(memory).view(rows.dtype).view(sizes)

    def _whole(self, row: Entry) -> Tensor:
        name = row.megatron
        if self._latest is None or self._latest[0] != name:
            self._latest = None  # or two of them would be in memory
            tensor = self._source.read_tensor(name)
            if isinstance(row.kind, PaddedVocabulary):
                tensor = row.kind.to_megatron([tensor])
            self._latest = (name, tensor)
        return self._latest[1]

    def _add_objects(self, rows: Sequence[Entry]) -> None:
        # As save_checkpoint stores them: what is not a tensor, and TransformerEngine's state of
        # each linear layer, which holds nothing without FP8 but is asked for by name.
        self._objects["common_state/shard_0_1"] = {"scheduler": {}, "trainer_state": {}}
        for row in rows:
            if _LINEAR_IN_LAYER.search(row.megatron):
                index, counts = (".".join(map(str, each)) for each in (row.index, row.counts))
                module = row.key.removesuffix("weight")
                self._objects[f"{module}_extra_state/shard_{index}_{counts}"] = None
        self._items += [
            WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._objects
        ]

    def _add_tensor(self, row: Entry) -> None:
        # megatron-core cuts gate from up, so that tensor-parallel ranks find their parts of each.
        num_parts = 2 if isinstance(row.kind, GatedMLP) else 1
        num_rows = row.shape[0] // num_parts
        ones = (1,) * len(row.index)
        for first_row in range(0, row.shape[0], num_rows):
            offsets = torch.Size((*row.index, first_row, *(0 for _ in row.shape[1:])))
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(
                    offsets=offsets, sizes=torch.Size((*ones, num_rows, *row.shape[1:]))
                ),
                properties=TensorProperties(dtype=self._source.tensors[row.megatron].dtype),
                size=torch.Size((*row.counts, *row.shape)),
            )
            self._items.append(
                WriteItem(MetadataIndex(row.key, offsets), WriteItemType.SHARD, tensor_data=data)
            )
            self._row_of[row.key, tuple(offsets)] = row


class _Writer(FileSystemWriter):
    """torch's writer, but an item is written while the next is made, and then dropped."""

    def __init__(self, path: Path, written: Callable[[int], object], max_file_bytes: int) -> None:
        super().__init__(path)
        self._path = path
        self._written = written
        self._max_file_bytes = max_file_bytes
        self.sums: dict[str, Sum] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items in the order of the plan, in files of about the largest size."""
        results: list[WriteResult] = []
        items = deque(plan.items)
        number = 0
        while items:
            name = f"{plan.storage_data.prefix}{number}{DEFAULT_SUFFIX}"
            number += 1
            num_bytes = 0
            stream = SummedFile(self._path / name)
            with write_behind() as behind:
                while items and num_bytes < self._max_file_bytes:
                    item = items.popleft()
                    data = planner.resolve_data(item)
                    num_bytes += (
                        data.nbytes if isinstance(data, Tensor) else data.getbuffer().nbytes
                    )
                    behind(partial(self._write, item, data, stream, name, results))
                    del data  # the thread has it: or two would wait beside the one that is made
            self.sums[name] = stream.close()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write(
        self,
        item: WriteItem,
        data: Tensor | io.BytesIO,
        stream: Any,
        file: str,
        results: list[WriteResult],
    ) -> None:
        start = stream.tell()
        if isinstance(data, Tensor):
            try:
                torch.save(data, stream)
            except RuntimeError as error:
                # torch's archive complains of a wrong position where the file has said that the
                # disk is full.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
            self._written(data.nbytes)
        else:
            stream.write(data.getbuffer())
        length = stream.tell() - start
        place = _StorageInfo(file, start, length)
        results.append(WriteResult(index=item.index, size_in_bytes=length, storage_data=place))
