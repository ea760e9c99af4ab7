"""TransformerEngine's FP8 scales, saved beside the weights under keys that end in _extra_state.

megatron-core's own linear layers save an empty object under the same keys, but its norms save none,
while TransformerEngine's have one each since version 2. So a checkpoint that was written on a CPU,
or by a conversion, lacks objects that a model on a GPU asks for; without them its modules keep the
scales they were built with.
"""

from collections.abc import Collection
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import nn

_SUFFIX = "_extra_state"


def leave_out_unstored(weights: dict[str, Any], *, stored: Collection[str]) -> None:
    """Ask for no extra state that a checkpoint does not hold: `weights` is changed in place.

    `stored` has the unique keys of what it holds.
    """
    for key, each in list(weights.items()):
        if (
            isinstance(each, ShardedObject)
            and each.key.endswith(_SUFFIX)
            and each.unique_key not in stored
        ):
            del weights[key]


def load_state(module: nn.Module, state: dict[str, Any]) -> None:
    """Load a module's state, by its own names; it may lack extra state but no weight."""
    # Attention has extra state too, and in megatron-core's checkpoints never any stored.
    found = module.load_state_dict(state, strict=False)
    unfit = [
        key for key in (*found.missing_keys, *found.unexpected_keys) if not key.endswith(_SUFFIX)
    ]
    assert not unfit, (
        f"a checkpoint's names are compared before it is read, but these do not fit: {unfit}"
    )
    for name, param in module.named_parameters():
        # An optimizer that is built next begins its masters from these, not from the FP8 weights;
        # one that was built before has taken them, and loads its own.
        initial = getattr(param, "get_high_precision_init_val", lambda: None)()
        if initial is not None:
            initial.copy_(state[name])
