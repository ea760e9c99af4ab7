"""TransformerEngine's names without TransformerEngine: what its spec saves, and loads.

Usage: te_stand_in.py FOLDER. It puts modules into the place of the package that have
TransformerEngine's parameters and extra state (transformer_engine/pytorch: Linear, LayerNormLinear,
GroupedLinear, RMSNorm; that of version 2) and compute nothing. megatron-core's TransformerEngine
layers subclass them, so which keys a checkpoint gets is decided by megatron-core's own code: the
layer spec, and every sharded_state_dict. It runs in a process of its own, for megatron-core asks
once, when it is imported, whether the package is there.

For each of SIZES, FOLDER/SIZE is a checkpoint of the local spec. It is loaded into
TransformerEngine's modules; these save it again as FOLDER/te-KIND; and FOLDER/keys.json gets the
keys of each kind.
"""

import importlib.abc
import importlib.machinery
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import nn

SIZES = {"dense": "toy", "moe": "toy-moe", "moe-grouped": "toy-moe"}


class WithExtraState(nn.Module):
    """As where FP8 is not in use: an empty tensor, and None is taken for nothing saved."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        assert state is None or not len(state)


class Linear(WithExtraState):
    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, **kwargs: Any
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features))


class LayerNormLinear(Linear):
    def __init__(
        self, in_features: int, *args: Any, normalization: str = "LayerNorm", **kwargs: Any
    ) -> None:
        super().__init__(in_features, *args, **kwargs)
        self.layer_norm_weight = nn.Parameter(torch.empty(in_features))
        if normalization == "LayerNorm":
            self.layer_norm_bias = nn.Parameter(torch.empty(in_features))


class GroupedLinear(WithExtraState):
    def __init__(
        self, num_gemms: int, in_features: int, out_features: int, bias: bool = True, **kwargs: Any
    ) -> None:
        super().__init__()
        self.num_gemms, self.use_bias = num_gemms, bias
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False, "recipe": None}
        self.fp8 = self.fp8_calibration = False
        for number in range(num_gemms):
            setattr(self, f"weight{number}", nn.Parameter(torch.empty(out_features, in_features)))

    def init_fp8_metadata(self, num_gemms: int) -> None:
        pass


class RMSNorm(WithExtraState):
    def __init__(self, normalized_shape: int, **kwargs: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(normalized_shape))


class DotProductAttention(WithExtraState):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


class StandIn(types.ModuleType):
    """A module of the package; whatever else is asked of it exists and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (nn.Module,), {}) if name[0].isupper() else MagicMock()
        setattr(self, name, value)
        return value


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes `transformer_engine` and all below it importable."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.split(".")[0] != "transformer_engine":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "transformer_engine":
            module.__version__ = "2.0.0"  # type: ignore[attr-defined]
        if module.__name__ == "transformer_engine.pytorch":
            for each in (Linear, LayerNormLinear, GroupedLinear, RMSNorm, DotProductAttention):
                setattr(module, each.__name__, each)
        if module.__name__ == "transformer_engine.pytorch.cpu_offload":
            module.get_cpu_offload_context = lambda *args: (None, None)  # type: ignore[attr-defined]


def keys_of(state: dict[str, Any]) -> list[str]:
    """The keys of a sharded state: `weight KEY` and `extra KEY`."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    parts = [part for part in nested_values(state) if not isinstance(part, ShardedTensorFactory)]
    factories = [part for part in nested_values(state) if isinstance(part, ShardedTensorFactory)]
    parts += [part for factory in factories for part in nested_values(factory.build())]
    return sorted(
        {f"{'weight' if isinstance(part, ShardedTensor) else 'extra'} {part.key}" for part in parts}
    )


def main(folder: Path) -> None:
    """All kinds; imports stand here because each save starts a process that imports this file."""
    sys.meta_path.insert(0, Finder())
    from megatron_vico import cpu_stand_in

    cpu_stand_in.install()
    from megatron_vico.checkpoint import training_checkpoint
    from megatron_vico.config.registry import get_model_config
    from megatron_vico.config.schema import ParallelOptions
    from megatron_vico.models import build
    from megatron_vico.parallel import groups as process_groups

    build.transformer_engine_usable = lambda: True  # it asks for a GPU too
    keys = {}
    with process_groups.started(ParallelOptions(), seed=1, timeout_minutes=5) as groups:
        for kind, size in SIZES.items():
            model = get_model_config(size)
            config = build.language_transformer_config(
                model,
                perform_initialization=False,
                moe_grouped_gemm=kind == "moe-grouped",
            )
            module = build.build_language_model(model, config, pg_collection=groups.language)
            assert type(module.gpt.decoder.layers[0].self_attention.linear_qkv).__name__.startswith(
                "TE"
            )
            # What sharded_state_dict is given in training_checkpoint.py.
            sharding = {"singleton_local_shards": False, "dp_cp_group": groups.language.dp_cp}
            keys[kind] = keys_of(module.sharded_state_dict(metadata=sharding))
            training_checkpoint.load_weights(
                folder / size, modules={"language_model": module}, model_size=size
            )
            metadata = training_checkpoint.CheckpointMetadata(model_size=size, stage="pretrain")
            training_checkpoint.save_checkpoint(
                folder / f"te-{kind}", 0, modules={"language_model": module}, metadata=metadata
            )
    (folder / "keys.json").write_text(json.dumps(keys))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
