"""The table against the published key lists, and against the real modules."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from megatron_vico.config.registry import MODELS, get_model_config
from megatron_vico.convert.modules import canonical_state
from megatron_vico.convert.names.internvl import entries, table
from megatron_vico.convert.options import LAYOUTS, Layout
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
    names = [name for row in entries(model, layout=layout).values() for name in row.files]
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
    assert found == {name: row.shape for name, row in entries(model, layout="flash").items()}


def test_vocabulary_is_padded_on_the_megatron_side_only() -> None:
    rows = entries(get_model_config("toy"), layout="hf", padded_vocab_size=640)
    row = rows["language_model.gpt.output_layer.weight"]
    assert row.shape == (640, 128)
    assert row.kind.to_hf(torch.empty(row.shape, device="meta"))[0].shape == (512, 128)


def test_every_row_has_a_place_in_the_flash_layout() -> None:
    assert all(row.flash is not None for row in table(get_model_config("toy")))


@pytest.mark.parametrize(("kind", "name"), [("dense", "toy"), ("moe", "toy-moe")])
def test_names_are_those_of_transformer_engine_on_the_disk(kind: str, name: str) -> None:
    """The golden list is derived from megatron-core: tests/unit/models/test_checkpoint_names.py."""
    golden = (Path(__file__).parents[2] / "golden" / f"te_keys_{kind}.txt").read_text().split("\n")
    expected = {line.removeprefix("weight ") for line in golden if line.startswith("weight ")}
    rows = entries(get_model_config(name), layout="flash").values()
    prefix = "language_model."
    found = {row.key.removeprefix(prefix) for row in rows if row.megatron.startswith(prefix)}
    assert found == expected


@pytest.mark.parametrize(
    ("own", "stored"),
    [
        ("local_experts.17.linear_fc1.weight", "experts.17.linear_fc1.weight"),
        ("linear_fc1.weight17", "experts.17.linear_fc1.weight"),
        ("linear_fc2.weight0", "experts.0.linear_fc2.weight"),
    ],
)
def test_experts_of_either_spec_have_one_name(own: str, stored: str) -> None:
    module = torch.nn.Module()
    key, name = (f"gpt.layers.3.mlp.experts.{each}" for each in (own, stored))
    module.state_dict = lambda: {key: torch.ones(1), "layers.3.mlp._extra_state": None}  # type: ignore[assignment]
    assert canonical_state({"model": module}).keys() == {f"model.{name}"}  # type: ignore[dict-item]
