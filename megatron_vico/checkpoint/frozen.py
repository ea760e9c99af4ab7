"""Frozen weights are written once per run: later checkpoints have links to the same files.

Every checkpoint is whole all the same: its .metadata names the linked files as its own, so that
every reader takes it as any other, and it may be copied, or the one it was linked from removed.
"""

import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_vico.checkpoint.integrity import Sum, is_complete, read_checksums
from megatron_vico.checkpoint.ranks import Ranks
from megatron_vico.checkpoint.restricted_pickle import read_metadata
from megatron_vico.files import replacing

_PREFIX = "frozen_"
_METADATA = ".metadata"

Weights = dict[str, dict[int, Any]]
"""By module and chunk, a module's sharded state under its own names."""


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """The frozen part of a state; the same formats on all ranks."""

    weights: Weights
    formats: Mapping[str, tuple[Any, tuple[int, ...]]]
    """Of all ranks: dtype and global shape by key."""


def take_frozen(
    weights: Weights, chunks: Mapping[str, Mapping[int, nn.Module]], *, ranks: Ranks
) -> Frozen:
    """Take what gets no gradients out of the `weights` of modules; called by every rank."""
    own: Weights = {}
    for name, of_chunk in weights.items():
        for index, state in of_chunk.items():
            params = chunks[name][index].named_parameters()
            frozen = {f"{name}.{key}" for key, param in params if not param.requires_grad}
            own.setdefault(name, {})[index] = {key: state[key] for key in frozen & state.keys()}
    formats = [_formats(own), _formats(weights, without=own)]
    gathered = ranks.gather(formats)
    trained = {key for _, others in gathered for key in others}
    found = {key: each for of_rank, _ in gathered for key, each in of_rank.items()}
    # A key may be of many layers, on several ranks: it is frozen where all of them are.
    kept = {key: each for key, each in found.items() if key not in trained}
    for name, of_chunk in own.items():
        for index, state in of_chunk.items():
            of_chunk[index] = {
                key: value
                for key, value in state.items()
                if all(part.key in kept for part in tensors_of(value))
            }
            for key in of_chunk[index]:
                del weights[name][index][key]
    return Frozen(weights=own, formats=kept)


def add_frozen(
    folder: Path,
    frozen: Frozen,
    *,
    earlier: Path | None,
    write: Callable[[dict[str, Any], Path], None],
    ranks: Ranks,
) -> dict[str, Sum]:
    """Complete a folder that holds the rest of a state, .metadata too; called by every rank.

    Args:
        earlier: a checkpoint with the very same frozen weights, because this run was loaded from it
            or has written it; None, there is none.
        write: writes a state to a folder, by all ranks.

    Returns:
        Checksums of the linked files.
    """
    linked: dict[str, Sum] | None = None
    if earlier is not None and ranks.is_main:
        linked = _link(earlier, folder, frozen)
    linked = ranks.gather(linked)[0]
    if linked is not None:
        return linked
    part = folder / "frozen"
    ranks.on_main(part.mkdir)
    write({"modules": frozen.weights}, part)
    ranks.on_main(lambda: _join(part, folder, frozen))
    return {}


def _link(earlier: Path, folder: Path, frozen: Frozen) -> dict[str, Sum] | None:
    """Link the frozen files of another checkpoint; None where that cannot be."""
    if not is_complete(earlier):
        return None
    stored = read_metadata(earlier)
    held = {
        index.fqn: stored.state_dict_metadata[index.fqn]
        for index, place in stored.storage_data.items()
        if place.relative_path.startswith(_PREFIX)
    }
    formats = {
        key: (each.properties.dtype, tuple(each.size))
        for key, each in held.items()
        if isinstance(each, TensorStorageMetadata)
    }
    if formats != frozen.formats:  # other modules are trained now, or in another format
        return None
    sums = {
        name: each
        for name, each in (read_checksums(earlier) or {}).items()
        if name.startswith(_PREFIX)
    }
    try:
        for name in sums:
            os.link(earlier / name, folder / name)
    except OSError:  # another file system, or one without links
        for name in sums:
            (folder / name).unlink(missing_ok=True)
        return None
    _add_metadata(folder, stored, frozen, rename=lambda name: name)
    return sums


def _join(part: Path, folder: Path, frozen: Frozen) -> None:
    """Move the files of a checkpoint into the one that it is a part of."""
    stored = read_metadata(part)
    for path in part.glob("*.distcp"):
        os.rename(path, folder / f"{_PREFIX}{path.name}")
    _add_metadata(folder, stored, frozen, rename=lambda name: f"{_PREFIX}{name}")
    shutil.rmtree(part)


def _add_metadata(
    folder: Path, stored: Metadata, frozen: Frozen, *, rename: Callable[[str], str]
) -> None:
    joined = read_metadata(folder)
    for key in frozen.formats:
        joined.state_dict_metadata[key] = stored.state_dict_metadata[key]
    for index, place in stored.storage_data.items():
        if index.fqn in frozen.formats:
            renamed = replace(place, relative_path=rename(place.relative_path))
            joined.storage_data[index] = renamed
    with replacing(folder / _METADATA) as unfinished:
        unfinished.write_bytes(pickle.dumps(joined))


def tensors_of(value: Any) -> list[ShardedTensor]:
    """The tensors that an entry of a sharded state is stored as."""
    if isinstance(value, ShardedTensor):
        return [value]
    if isinstance(value, ShardedTensorFactory):
        return [each for each in nested_values(value.build()) if isinstance(each, ShardedTensor)]
    return []


def _formats(
    weights: Weights, *, without: Weights | None = None
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    return {
        part.key: (part.dtype, tuple(part.global_shape))
        for name, of_chunk in weights.items()
        for index, state in of_chunk.items()
        for key, value in state.items()
        if without is None or key not in without[name][index]
        for part in tensors_of(value)
    }
