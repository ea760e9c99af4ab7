"""The table against the published key lists, and against the real modules."""

import itertools
import re

import pytest
import torch

from megatron_vico.config.registry import MODELS, get_model_config
from megatron_vico.convert.convert import canonical_state
from megatron_vico.convert.names.internvl import LAYOUTS, Layout, canonical_name, entries, table
from tests.toy_models import make_encoder, make_language_model

VIT_REMOTE = """
vision_model.embeddings.class_embedding vision_model.embeddings.position_embedding
vision_model.embeddings.patch_embedding.{weight,bias}
vision_model.encoder.layers.N.attn.qkv.weight vision_model.encoder.layers.N.attn.proj.{weight,bias}
vision_model.encoder.layers.N.mlp.fc1.{weight,bias}
vision_model.encoder.layers.N.mlp.fc2.{weight,bias}
vision_model.encoder.layers.N.norm1.weight vision_model.encoder.layers.N.norm2.weight
vision_model.encoder.layers.N.ls1 vision_model.encoder.layers.N.ls2
mlp1.0.{weight,bias} mlp1.1.{weight,bias} mlp1.3.{weight,bias}
"""
VIT_REMOTE_300M = """
vision_model.encoder.layers.N.attn.qkv.bias
vision_model.encoder.layers.N.norm1.bias vision_model.encoder.layers.N.norm2.bias
"""
VIT_REMOTE_6B = "vision_model.encoder.layers.N.attn.{q_norm,k_norm}.weight"
VIT_NATIVE = """
vision_tower.embeddings.cls_token vision_tower.embeddings.position_embeddings
vision_tower.embeddings.patch_embeddings.projection.{weight,bias}
vision_tower.encoder.layer.N.attention.{q_proj,k_proj,v_proj}.weight
vision_tower.encoder.layer.N.attention.projection_layer.{weight,bias}
vision_tower.encoder.layer.N.mlp.fc1.{weight,bias}
vision_tower.encoder.layer.N.mlp.fc2.{weight,bias}
vision_tower.encoder.layer.N.layernorm_before.weight
vision_tower.encoder.layer.N.layernorm_after.weight
vision_tower.encoder.layer.N.lambda_1 vision_tower.encoder.layer.N.lambda_2
multi_modal_projector.layer_norm.{weight,bias}
multi_modal_projector.linear_1.{weight,bias} multi_modal_projector.linear_2.{weight,bias}
"""
VIT_NATIVE_300M = """
vision_tower.encoder.layer.N.attention.{q_proj,k_proj,v_proj}.bias
vision_tower.encoder.layer.N.layernorm_before.bias vision_tower.encoder.layer.N.layernorm_after.bias
"""
VIT_NATIVE_6B = "vision_tower.encoder.layer.N.attention.{q_norm,k_norm}.weight"
FLASH = """
mlp2.0.{weight,bias} mlp2.1.{weight,bias} mlp2.4.{weight,bias} mlp2.7.{weight,bias}
pooling_before_gating.query_token
pooling_before_gating.{attn1,attn2,attn3,attn4}.{in_proj_weight,in_proj_bias,out_proj.weight,out_proj.bias}
pooling_before_gating.{norm1,norm2,norm3,norm4}.{weight,bias}
gating.{block1,block2,block3,block4}.0.{weight,bias}
gating.{block1,block2,block3,block4}.3.{weight,bias}
gating.{block1,block2,block3,block4}.5.{weight,bias} gating.gate.0.{weight,bias}
gating.gate.1.{weight,bias}
"""
LANGUAGE = """
language_model.model.embed_tokens.weight language_model.model.norm.weight
language_model.lm_head.weight
language_model.model.layers.N.{input_layernorm,post_attention_layernorm}.weight
language_model.model.layers.N.self_attn.{q_proj,k_proj,v_proj,o_proj,q_norm,k_norm}.weight
"""
DENSE = "language_model.model.layers.N.mlp.{gate_proj,up_proj,down_proj}.weight"
EXPERTS = """
language_model.model.layers.N.mlp.gate.weight
language_model.model.layers.N.mlp.experts.N.{gate_proj,up_proj,down_proj}.weight
"""


def expand(text: str) -> set[str]:
    """`a.{b,c}` in every combination."""
    names = set()
    for name in text.split():
        parts = re.split("[{}]", name)  # every second one is a list of choices
        choices = [part.split(",") if index % 2 else [part] for index, part in enumerate(parts)]
        names |= {"".join(each) for each in itertools.product(*choices)}
    return names


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_file_names_are_the_published_ones(name: str, layout: Layout) -> None:
    model = get_model_config(name)
    big = model.vision.qk_norm
    if layout == "hf":
        expected = VIT_NATIVE + (VIT_NATIVE_6B if big else VIT_NATIVE_300M)
    else:
        expected = VIT_REMOTE + (VIT_REMOTE_6B if big else VIT_REMOTE_300M)
    expected += LANGUAGE + (DENSE if model.language.num_experts is None else EXPERTS)
    expected += FLASH if layout == "flash" else ""
    names = [name for row in entries(model, layout=layout) for name in row.files]
    assert len(names) == len(set(names))
    assert {re.sub(r"(layers?|experts)\.\d+\.", r"\1.N.", name) for name in names} == expand(
        expected
    )


@pytest.mark.parametrize("name", ["toy", "toy-6b", "toy-moe"])
def test_megatron_names_and_shapes_are_those_of_the_modules(
    name: str, single_process_groups: None
) -> None:
    model = get_model_config(name)
    modules = {"encoder": make_encoder(model), "language_model": make_language_model(model)}
    found = {name: tuple(tensor.shape) for name, tensor in canonical_state(modules).items()}
    assert found == {row.megatron: row.shape for row in entries(model, layout="flash")}


def test_vocabulary_is_padded_on_the_megatron_side_only() -> None:
    rows = {
        row.megatron: row
        for row in entries(get_model_config("toy"), layout="hf", padded_vocab_size=640)
    }
    row = rows["language_model.gpt.output_layer.weight"]
    assert row.shape == (640, 128)
    assert row.kind.to_hf(torch.empty(row.shape, device="meta"))[0].shape == (512, 128)


def test_every_row_has_a_place_in_the_flash_layout() -> None:
    assert all(row.flash is not None for row in table(get_model_config("toy")))


@pytest.mark.parametrize(
    ("engine", "local"),
    [
        ("layers.3.self_attention.linear_qkv.layer_norm_weight", "layers.3.input_layernorm.weight"),
        ("layers.3.mlp.linear_fc1.layer_norm_weight", "layers.3.pre_mlp_layernorm.weight"),
        (
            "layers.3.mlp.experts.linear_fc1.weight17",
            "layers.3.mlp.experts.local_experts.17.linear_fc1.weight",
        ),
        (
            "layers.3.mlp.experts.linear_fc2.weight0",
            "layers.3.mlp.experts.local_experts.0.linear_fc2.weight",
        ),
        ("layers.3.self_attention.linear_qkv.weight", "layers.3.self_attention.linear_qkv.weight"),
        ("layers.3.pre_mlp_layernorm.weight", "layers.3.pre_mlp_layernorm.weight"),
        ("layers.3.mlp.linear_fc1._extra_state", None),
    ],
)
def test_transformer_engine_names(engine: str, local: str | None) -> None:
    assert canonical_name(engine) == local
