"""Many layouts in one launch: megatron-core's process groups, made once per layout and switched
between.

megatron-core keeps its groups in module globals, and destroying them leaks threads and sockets
until nothing moves.
"""

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel

from megatron_vico.config.schema import ParallelOptions
from megatron_vico.parallel.groups import Groups, started


class CachedLayouts:
    """The layouts that a launch has used; to be made once, when torch.distributed runs and
    megatron-core does not."""

    def __init__(self, *, seed: int = 1) -> None:
        """The seed is set again at each switch, as at the start of a run."""
        assert not parallel_state.model_parallel_is_initialized()
        self._seed = seed
        self._blank = _globals()
        self._known: dict[tuple[int | None, ...], tuple[dict[str, Any], Groups]] = {}

    def switch_to(self, options: ParallelOptions) -> Groups:
        """Make a layout megatron-core's current one, and return its groups; called by every rank.

        Ranks that it has no other use for are more data parallelism. What was built under another
        layout needs a switch back before it is used again.
        """
        # All that groups depend on: recompute and overlap do not get groups of their own.
        key = (
            options.tensor_model_parallel_size,
            options.pipeline_model_parallel_size,
            options.num_layers_per_virtual_pipeline_stage,
            options.context_parallel_size,
            options.expert_model_parallel_size,
            options.expert_tensor_parallel_size,
        )
        if key in self._known:
            state, groups = self._known[key]
            _set_globals(state)
            torch.manual_seed(self._seed)
            tensor_parallel.model_parallel_cuda_manual_seed(self._seed)
            return groups
        _set_globals(self._blank)
        with started(options, seed=self._seed, timeout_minutes=1) as groups:
            self._known[key] = (
                _globals(),
                groups,
            )  # torch.distributed is not its own: it leaves them running
        return groups


def _set_globals(state: dict[str, Any]) -> None:
    vars(parallel_state).update({name: _copy(value) for name, value in state.items()})


def _globals() -> dict[str, Any]:
    """What megatron-core keeps about the running layout."""
    return {
        name: _copy(value)
        for name, value in vars(parallel_state).items()
        if name.startswith("_") and (name.isupper() or name == "_global_process_group_list")
    }


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list)) else value  # they are filled in place
