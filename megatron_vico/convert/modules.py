"""A source into modules in memory, and these under the table's names."""

import re
from collections.abc import Mapping

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_vico.convert.names.internvl import entries
from megatron_vico.convert.names.kinds import PaddedVocabulary
from megatron_vico.convert.source import Source, TensorInfo, problems_with
from megatron_vico.errors import CheckpointError
from megatron_vico.models.build import padded_vocab_size
from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.models.language_model import LanguageModel

_LAYER = re.compile(r".*\.layers\.\d+\.")
# How experts are told apart: modules of their own in the local spec, numbered weights of one
# grouped layer in TransformerEngine's.
_EXPERTS = (
    (re.compile(r"mlp\.experts\.local_experts\.(\d+)\."), r"mlp.experts.experts.\1."),
    (
        re.compile(r"mlp\.experts\.linear_fc([12])\.weight(\d+)$"),
        r"mlp.experts.experts.\2.linear_fc\1.weight",
    ),
)


def load_source(source: Source, *, encoder: VisionEncoder, language_model: LanguageModel) -> None:
    """Read a source into modules; of a language model that ranks share, this rank's part.

    What it does not hold (connector_16x and ViR, outside of flash) keeps the modules' values.
    CheckpointError if a module's tensors have other names or shapes than the table says.
    """
    target = canonical_state({"encoder": encoder, "language_model": language_model})
    group = language_model.tp_group
    padded = padded_vocab_size(source.model.language.vocab_size, group.size())
    rows = entries(source.model, layout="flash", padded_vocab_size=padded)
    infos = {
        name: TensorInfo(shape=tuple(tensor.shape), dtype=tensor.dtype)
        for name, tensor in target.items()
    }
    problems = problems_with(infos, rows)
    if problems and group.size() == 1:
        raise CheckpointError(f"the model to load into: {'; '.join(problems)}.")
    with torch.no_grad():
        for name in source.tensors:
            tensor, kind = source.read_tensor(name), rows[name].kind
            if isinstance(kind, PaddedVocabulary):
                tensor = kind.to_megatron([tensor])
            target[name].copy_(_rank_part(tensor, target[name].shape, name=name, group=group))


def _rank_part(
    whole: Tensor, shape: torch.Size, *, name: str, group: torch.distributed.ProcessGroup
) -> Tensor:
    """What a tensor-parallel rank holds of a tensor: the dimension that is shorter is cut."""
    if whole.shape == shape:
        return whole
    dim = next(at for at, size in enumerate(shape) if size != whole.size(at))
    halves = whole.chunk(2) if "linear_fc1" in name else [whole]  # gate and up: a part of each
    return torch.cat([half.chunk(group.size(), dim=dim)[group.rank()] for half in halves])


def canonical_state(modules: Mapping[str, MegatronModule]) -> dict[str, Tensor]:
    """The modules' own tensors under the table's names, whichever spec they were built with.

    TransformerEngine's `_extra_state`, which holds no weights, is left out.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, module in modules.items():
        # megatron-core's own map from a layer's names to those on the disk; the layer's spec has it
        # (models/build.py).
        maps = {
            f"{path}.": layer.submodules_config.sharded_state_dict_keys_map
            for path, layer in module.named_modules()
            if isinstance(layer, TransformerLayer)
        }
        for key, tensor in module.state_dict().items():
            if not key.endswith("_extra_state"):
                tensors[f"{prefix}.{_stored_name(key, maps)}"] = tensor
    return tensors


def _stored_name(key: str, maps: Mapping[str, Mapping[str, str]]) -> str:
    layer = _LAYER.match(key)
    if layer is None:
        return key
    start, rest = layer[0], key[layer.end() :]
    for own, stored in maps.get(start, {}).items():
        if rest.startswith(own):
            rest = stored + rest.removeprefix(own)
    for pattern, stored in _EXPERTS:
        rest = pattern.sub(stored, rest)
    return start + rest
