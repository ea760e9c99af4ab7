"""The names in mcore's checkpoints: TransformerEngine's, also where the layers are mcore's own."""

from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from megatron_vico.models.registry import get_model_config
from tests.toy_models import make_encoder, make_language_model

ATTENTION = {
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "self_attention.linear_proj.weight",
}
DENSE = {"mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}
# A layer with experts keeps its norm apart under TransformerEngine too.
EXPERTS = {
    "pre_mlp_layernorm.weight",
    "mlp.router.weight",
    "mlp.experts.experts.linear_fc1.weight",
    "mlp.experts.experts.linear_fc2.weight",
}


def tensor_names(module: torch.nn.Module) -> set[str]:
    state: dict[str, Any] = module.sharded_state_dict()  # type: ignore[operator]
    names = set()
    for value in state.values():
        parts = value.build() if isinstance(value, ShardedTensorFactory) else [value]
        names |= {part.key for part in parts if isinstance(getattr(part, "data", None), torch.Tensor)}
    return names


@pytest.mark.parametrize(("name", "mlp"), [("toy", DENSE), ("toy-moe", EXPERTS)])
def test_language_model_has_the_names_of_transformer_engine(
    name: str, mlp: set[str], single_process_groups: None
) -> None:
    names = tensor_names(make_language_model(get_model_config(name)))
    layers = {f"gpt.decoder.layers.{key}" for key in ATTENTION | mlp}
    assert names == layers | {
        "gpt.embedding.word_embeddings.weight",
        "gpt.decoder.final_layernorm.weight",
        "gpt.output_layer.weight",
    }


def test_encoder_names(single_process_groups: None) -> None:
    encoder = make_encoder(get_model_config("toy-6b"))
    names = tensor_names(encoder)
    layers = {name.removeprefix("vit.transformer.layers.") for name in names if ".layers." in name}
    assert layers == {
        *("input_layernorm.weight", "pre_mlp_layernorm.weight", "self_attn_bda.scale", "mlp_bda.scale"),
        *("self_attention.linear_qkv.weight", "self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"),
        *("self_attention.linear_proj.weight", "self_attention.linear_proj.bias"),
        *("mlp.linear_fc1.weight", "mlp.linear_fc1.bias", "mlp.linear_fc2.weight", "mlp.linear_fc2.bias"),
    }
    # Layers share a name and differ in an offset; everything else is named as the parameter is.
    others = {name for name, _ in encoder.named_parameters() if ".layers." not in name}
    assert {name for name in names if ".layers." not in name} == others
    assert {"vit.class_token", "vit.position_embedding", "vit.patch_embedding.weight"} < others
