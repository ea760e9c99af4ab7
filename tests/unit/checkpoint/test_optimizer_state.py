"""An optimizer's state in a checkpoint: cut where it lies, never gathered."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_vico.checkpoint.optimizer_state import boxes, sharded_state
from megatron_vico.parallel.groups import Groups
from tests.checkpoint_runs import make_training


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_boxes_are_the_run_in_its_order(shape: list[int], data: st.DataObject) -> None:
    numbers = torch.arange(math.prod(shape)).view(shape)
    start = data.draw(st.integers(0, numbers.numel()))
    end = data.draw(st.integers(start, numbers.numel()))
    found = list(boxes(tuple(shape), start, end))
    pieces = [
        numbers[tuple(slice(first, first + n) for first, n in zip(offset, size, strict=True))]
        for offset, size in found
    ]
    assert [each for piece in pieces for each in piece.flatten().tolist()] == [*range(start, end)]
    assert len(found) <= 2 * len(shape) - 1


@pytest.mark.parametrize("size", ["toy-6b", "toy-moe"])
def test_state_is_written_and_read_where_it_lies(
    size: str, groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without megatron-core's gathering, and without a copy of any tensor."""
    monkeypatch.delattr(DistributedOptimizer, "get_parameter_state_dp_zero")
    one, other = (
        make_training(size, groups=groups, seed=seed, optimizer="sharded") for seed in (1, 2)
    )
    one.step(0)
    one.save(tmp_path, 1)
    other.load(tmp_path)
    weights = {
        name: {0: chunk.sharded_state_dict(prefix=f"{name}.")}
        for name, (chunk,) in other.modules.items()
    }
    held = {
        tensor.untyped_storage().data_ptr()
        for part in other.optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for param in group["params"]
        for tensor in (param, *part.optimizer.state[param].values())
        if isinstance(tensor, torch.Tensor)
    }
    for part in sharded_state(other.optimizer, weights, is_loading=True).values():
        for of_param in part["param_state"].values():
            assert of_param.keys() == {"param", "exp_avg", "exp_avg_sq"}
            for found in of_param.values():
                for box in found.values():
                    assert box.data.untyped_storage().data_ptr() in held
