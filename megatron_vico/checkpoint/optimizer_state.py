"""An optimizer's state in a checkpoint: under parameter names and in their shapes, for any layout.

The distributed optimizer's is megatron-core's `fully_reshardable` form on the disk, but not made as
there, where each rank gathers the state of its whole model part into host memory (12 bytes a
parameter, both to save and to load). A rank has a run of each flattened parameter; that run is cut
into boxes of the parameter, which are written and read where they lie.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys
from torch import Tensor, nn

_SHARDING = {"chained_optim_avoid_prefix": True, "singleton_local_shards": False}


def kind_of(optimizer: MegatronOptimizer) -> Literal["replicated", "distributed"]:
    """Whether the state is whole on every data-parallel rank, or each has a part of it."""
    is_distributed = any(isinstance(part, DistributedOptimizer) for part in _chained(optimizer))
    return "distributed" if is_distributed else "replicated"


def sharded_state(
    optimizer: MegatronOptimizer, weights: dict[str, Any], *, is_loading: bool
) -> dict[Any, Any]:
    """The state as dist_checkpointing wants it; to be loaded into, tensors are made where none are.

    `weights` are the modules' sharded state, with parameters as data.
    """
    if kind_of(optimizer) == "replicated":
        state: dict[Any, Any] = optimizer.sharded_state_dict(
            weights, is_loading=is_loading, metadata=_SHARDING
        )
        return state
    found, _ = extract_sharded_tensors_and_factories(weights)
    by_param = {each.data: each for each in nested_values(found)}
    states = {
        index: _state_of(part, by_param, is_loading=is_loading)
        for index, part in enumerate(_chained(optimizer))
    }
    return states if len(states) > 1 else states[0]


def load_state(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """Take over what dist_checkpointing made of `sharded_state`."""
    _add_missing(optimizer, state)
    if kind_of(optimizer) == "replicated":
        optimizer.load_state_dict(state)
        return
    parts = _chained(optimizer)
    states = [state[index] for index in range(len(parts))] if len(parts) > 1 else [state]
    for part, of_part in zip(parts, states, strict=True):
        part.load_state_dict({"optimizer": of_part["optimizer"]})
        for index, (param, _) in enumerate(_runs(part)):
            loaded = {
                name: torch.cat([boxes[number].flatten() for number in sorted(boxes)])
                for name, boxes in of_part["param_state"][index].items()
            }
            part._set_main_param_and_optimizer_states(param, loaded)
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            part.optimizer._sync_hdo_state_to_sub_optimizers()


def _chained(optimizer: MegatronOptimizer) -> Sequence[MegatronOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _state_of(
    part: DistributedOptimizer, by_param: dict[Tensor, Any], *, is_loading: bool
) -> dict[str, Any]:
    if is_loading:
        part.load_state_dict(part.state_dict())  # makes the tensors
    state: dict[str, Any] = part.state_dict()
    state["param_state"] = {
        index: {
            name: dict(enumerate(_boxes_of(by_param[param], name, run, start, part)))
            for name, run in part._get_main_param_and_optimizer_states(param).items()
            if run.dim()  # not torch's own count of steps
        }
        for index, (param, start) in enumerate(_runs(part))
    }
    return state


def _runs(part: DistributedOptimizer) -> Iterator[tuple[nn.Parameter, int]]:
    """The parameters of which this rank has a part, and where in the flattened one it starts."""
    for maps in part.gbuf_ranges:
        for buckets in maps.values():
            for bucket in buckets:
                for param, ranges in bucket["param_map"].items():
                    yield param, ranges["param"].start


def _boxes_of(
    described: ShardedTensor | ShardedTensorFactory,
    name: str,
    run: Tensor,
    start: int,
    part: DistributedOptimizer,
) -> Iterator[ShardedTensor]:
    """A run of a flattened parameter as boxes of the global tensors that this is stored in."""
    # Of no memory: only how the parameter is cut into those is asked of it (gate and up are two).
    like = torch.empty(described.data.shape, dtype=torch.float32, device="meta")
    if isinstance(described, ShardedTensorFactory):
        tensors = list(nested_values(replace(described, data=like).build()))
    else:
        tensors = [replace(described, data=like, dtype=like.dtype)]
    run = run.detach().float()
    for tensor in sorted(tensors, key=lambda each: each.data.storage_offset()):
        assert tensor.data.is_contiguous(), tensor.key
        first = tensor.data.storage_offset()
        begin, end = max(start, first), min(start + len(run), first + tensor.data.numel())
        for offset, size in boxes(tuple(tensor.data.shape), begin - first, end - first):
            prepended = tensor.prepend_axis_num
            shape = (*([1] * prepended), *size)
            data = run[begin - start :][: math.prod(size)].view(shape)
            begin += data.numel()
            own = zip(tensor.global_offset[prepended:], offset, strict=True)
            yield replace(
                tensor,
                key=f"optimizer.state.{name}.{tensor.key}",
                data=data,
                local_shape=shape,
                global_offset=(*tensor.global_offset[:prepended], *map(sum, own)),
                axis_fragmentations=None,
                prepend_axis_num=0,
                # No data-parallel rank has what another has.
                replica_id=(*tensor.replica_id[:2], part.distributed_optimizer_instance_id),
            )


def boxes(
    shape: tuple[int, ...], start: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offset and size of the boxes that elements `start` to `end` of a tensor are, in their order.

    The rest of a first row, whole rows, the begin of a last one: at most 2 * len(shape) - 1.
    """
    if start >= end:
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    row = math.prod(shape[1:])
    first, last = start // row, end // row
    if first == last or start % row:
        for offset, size in boxes(shape[1:], start % row, min(end - first * row, row)):
            yield (first, *offset), (1, *size)
        first += 1
    if first < last:
        yield (first, *([0] * (len(shape) - 1))), (last - first, *shape[1:])
    if first <= last:
        for offset, size in boxes(shape[1:], 0, end % row):
            yield (last, *offset), (1, *size)


def differing_settings(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> str:
    """What saved parameter groups have and this run's have not, such as a learning rate."""
    clauses = []
    for key in param_group_identifier_keys:
        saved, own = (
            sorted({str(group.get(key)) for group in groups})
            for groups in (_groups_in(state), optimizer.param_groups)
        )
        if saved != own:
            clauses.append(f"{key} is {' and '.join(saved)} in it, {' and '.join(own)} here")
    return ", ".join(clauses)


def _add_missing(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """Settings that the Adam which saved does not have: TransformerEngine's asks for one more."""
    for group in _groups_in(state):
        for part in _chained(optimizer):
            for name, value in getattr(part.optimizer, "defaults", {}).items():
                group.setdefault(name, value)


def _groups_in(state: Any) -> Iterator[dict[str, Any]]:
    if isinstance(state, dict):
        yield from state.get("param_groups", ())
        for value in state.values():
            yield from _groups_in(value)
