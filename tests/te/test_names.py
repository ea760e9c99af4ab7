"""A checkpoint of the project's own layers loads into TransformerEngine's, and theirs into ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_vico.checkpoint import training_checkpoint
from megatron_vico.checkpoint.run_folder import iteration_folder
from megatron_vico.config.registry import get_model_config
from megatron_vico.models.build import build_language_model, language_transformer_config
from megatron_vico.models.language_model import LanguageModel
from tests.toy_models import make_language_model
from tests.unit.models.test_checkpoint_names import golden_keys, stored_keys

SIZES = {"dense": "toy", "moe": "toy-moe", "moe-grouped": "toy-moe"}


def keys_of(state: dict[str, Any]) -> set[str]:
    """The keys of a sharded state: `weight KEY` and `extra KEY`."""
    parts = [
        part
        for each in nested_values(state)
        for part in (
            nested_values(each.build()) if isinstance(each, ShardedTensorFactory) else [each]
        )
    ]
    return {
        f"{'weight' if isinstance(part, ShardedTensor) else 'extra'} {part.key}" for part in parts
    }


def save(module: LanguageModel, folder: Path, size: str) -> None:
    metadata = training_checkpoint.CheckpointMetadata(model_size=size, stage="pretrain")
    training_checkpoint.save_checkpoint(
        iteration_folder(folder, 0), modules={"language_model": module}, metadata=metadata
    )


def load(module: LanguageModel, folder: Path, size: str) -> None:
    training_checkpoint.load_weights(folder, modules={"language_model": module}, model_size=size)


@pytest.mark.parametrize("kind", SIZES)
def test_weights_go_to_transformer_engine_and_back(
    kind: str, tmp_path: Path, single_process_groups: None
) -> None:
    """Bit for bit, under the golden keys."""
    size = SIZES[kind]
    model = get_model_config(size)
    save(make_language_model(model), tmp_path / "own", size)
    config = language_transformer_config(model, moe_grouped_gemm=kind == "moe-grouped")
    engine = build_language_model(model, config)
    assert type(engine.gpt.decoder.layers[0].self_attention.linear_qkv).__module__.startswith(
        "megatron.core.extensions.transformer_engine"
    )
    # What sharded_state_dict is given in training_checkpoint.py.
    sharding = {"singleton_local_shards": False, "dp_cp_group": engine.gpt.pg_collection.dp_cp}
    expected_keys = golden_keys(kind.split("-")[0])
    assert keys_of(engine.sharded_state_dict(metadata=sharding)) == expected_keys
    load(engine, tmp_path / "own", size)
    save(engine, tmp_path / "engine", size)
    assert stored_keys(tmp_path / "engine") == expected_keys

    back = make_language_model(model, seed=9)
    load(back, tmp_path / "engine", size)
    expected = dict(make_language_model(model).named_parameters())
    found = dict(back.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
