"""The names in mcore's checkpoints: TransformerEngine's, also where the layers are mcore's own."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_vico.checkpoint import training_checkpoint
from megatron_vico.checkpoint.extra_state import load_state
from megatron_vico.checkpoint.run_folder import iteration_folder
from megatron_vico.config.registry import get_model_config
from tests.toy_models import make_encoder, make_language_model

GOLDEN = Path(__file__).parents[3] / "tests" / "golden"
SIZES = {"dense": "toy", "moe": "toy-moe"}


def golden_keys(kind: str) -> set[str]:
    """`weight KEY` and `extra KEY` of a language model under the TransformerEngine spec."""
    lines = (GOLDEN / f"te_keys_{kind}.txt").read_text().splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def stored_keys(folder: Path) -> set[str]:
    """As `golden_keys`, of a checkpoint on the disk."""
    found = FileSystemReader(folder / "iter_0000000").read_metadata().state_dict_metadata
    keys = set()
    for key, each in found.items():
        if "gpt." in key:
            kind = "weight" if isinstance(each, TensorStorageMetadata) else "extra"
            keys.add(f"{kind} {key.removeprefix('language_model.').split('/')[0]}")
    return keys


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, single_process_groups: None) -> Path:
    """Checkpoints of the local spec; what TransformerEngine's layers make of them:
    tests/te/test_names.py."""
    root = tmp_path_factory.mktemp("names")
    for size in SIZES.values():
        module = make_language_model(get_model_config(size))
        metadata = training_checkpoint.CheckpointMetadata(model_size=size, stage="pretrain")
        training_checkpoint.save_checkpoint(
            iteration_folder(root / size, 0), modules={"language_model": module}, metadata=metadata
        )
    return root


@pytest.mark.slow
@pytest.mark.parametrize("kind", SIZES)
def test_a_checkpoint_of_the_local_spec_has_the_keys_of_transformer_engine(
    kind: str, folder: Path
) -> None:
    expected = golden_keys(kind)
    # All weights, and of the extra state what linear layers have: megatron-core's own norms have
    # none, and loading does not ask for what a checkpoint lacks.
    norms = {key for key in expected if key.startswith("extra ") and "layernorm." in key}
    assert stored_keys(folder / SIZES[kind]) == expected - norms
    assert norms


def test_only_extra_state_may_be_absent() -> None:
    module = torch.nn.Linear(2, 2)
    with pytest.raises(AssertionError, match=r"do not fit: \['bias', 'other'\]"):
        load_state(
            module, {"weight": module.weight, "other": module.weight, "norm._extra_state": None}
        )


def test_encoder_names(single_process_groups: None) -> None:
    encoder = make_encoder(get_model_config("toy-6b"))
    state: dict[str, Any] = encoder.sharded_state_dict()
    names = {
        value.key
        for value in state.values()
        if isinstance(getattr(value, "data", None), torch.Tensor)
    }
    # Layers share a name and differ in an offset; everything else is named as the parameter is.
    named = encoder.named_parameters()
    expected = {re.sub(r"\.layers\.\d+\.", ".layers.", name) for name, _ in named}
    assert names == expected
    assert "vit.transformer.layers.self_attn_bda.scale" in names
