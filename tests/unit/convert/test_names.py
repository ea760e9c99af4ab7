"""The table of names against the published key lists and shapes, and against the real modules.

Nothing here has memory: modules and file tensors are on the meta device. What is expected is
written down anew from the published configurations and key lists, not taken from the table.
"""

import itertools
import math
import re
from collections import Counter
from functools import cache

import pytest
import torch
from torch import Tensor

from megatron_vico.config.registry import get_model_config
from megatron_vico.convert.modules import canonical_state
from megatron_vico.convert.names.internvl import entries
from megatron_vico.convert.options import LAYOUTS, Layout
from tests.meta_models import build_without_memory
from tests.unit.config.test_registry import PUBLISHED

Shape = tuple[int, ...]

# A name a line and the shape of each layer or expert N of it; a bias has the first number only.
# D, F: width of the tower and of its MLPs. H, E, X: width of the language model, of its MLPs or an
# expert's, and experts. Q, K: rows of queries and keys. A: of a head. V: vocabulary.
REMOTE = """
vision_model.embeddings.class_embedding 1 1 D
vision_model.embeddings.position_embedding 1 POSITIONS D
vision_model.embeddings.patch_embedding.{weight,bias} D 3 PATCH PATCH
vision_model.encoder.layers.N.attn.qkv.weight 3D D
vision_model.encoder.layers.N.attn.proj.{weight,bias} D D
vision_model.encoder.layers.N.mlp.fc1.{weight,bias} F D
vision_model.encoder.layers.N.mlp.fc2.{weight,bias} D F
vision_model.encoder.layers.N.{norm1,norm2}.weight D
vision_model.encoder.layers.N.{ls1,ls2} D
mlp1.0.{weight,bias} 4D
mlp1.1.{weight,bias} H 4D
mlp1.3.{weight,bias} H H
"""
REMOTE_300M = """
vision_model.encoder.layers.N.attn.qkv.bias 3D
vision_model.encoder.layers.N.{norm1,norm2}.bias D
"""
REMOTE_6B = "vision_model.encoder.layers.N.attn.{q_norm,k_norm}.weight D"
NATIVE = """
vision_tower.embeddings.cls_token 1 1 D
vision_tower.embeddings.position_embeddings 1 POSITIONS D
vision_tower.embeddings.patch_embeddings.projection.{weight,bias} D 3 PATCH PATCH
vision_tower.encoder.layer.N.attention.{q_proj,k_proj,v_proj}.weight D D
vision_tower.encoder.layer.N.attention.projection_layer.{weight,bias} D D
vision_tower.encoder.layer.N.mlp.fc1.{weight,bias} F D
vision_tower.encoder.layer.N.mlp.fc2.{weight,bias} D F
vision_tower.encoder.layer.N.{layernorm_before,layernorm_after}.weight D
vision_tower.encoder.layer.N.{lambda_1,lambda_2} D
multi_modal_projector.layer_norm.{weight,bias} 4D
multi_modal_projector.linear_1.{weight,bias} H 4D
multi_modal_projector.linear_2.{weight,bias} H H
"""
NATIVE_300M = """
vision_tower.encoder.layer.N.attention.{q_proj,k_proj,v_proj}.bias D
vision_tower.encoder.layer.N.{layernorm_before,layernorm_after}.bias D
"""
NATIVE_6B = "vision_tower.encoder.layer.N.attention.{q_norm,k_norm}.weight D"
FLASH = """
mlp2.0.{weight,bias} 16D
mlp2.1.{weight,bias} 2H 16D
mlp2.4.{weight,bias} 2H 2H
mlp2.7.{weight,bias} H 2H
pooling_before_gating.query_token 1 D
pooling_before_gating.{attn1,attn2,attn3,attn4}.{in_proj_weight,in_proj_bias} 3D D
pooling_before_gating.{attn1,attn2,attn3,attn4}.out_proj.{weight,bias} D D
pooling_before_gating.{norm1,norm2,norm3,norm4}.{weight,bias} D
gating.{block1,block2,block3,block4}.0.{weight,bias} 4D D
gating.{block1,block2,block3,block4}.3.{weight,bias} D 4D
gating.{block1,block2,block3,block4}.5.{weight,bias} D
gating.gate.0.{weight,bias} D
gating.gate.1.{weight,bias} 2 D
"""
LANGUAGE = """
language_model.model.embed_tokens.weight V H
language_model.model.norm.weight H
language_model.lm_head.weight V H
language_model.model.layers.N.{input_layernorm,post_attention_layernorm}.weight H
language_model.model.layers.N.self_attn.q_proj.weight Q H
language_model.model.layers.N.self_attn.{k_proj,v_proj}.weight K H
language_model.model.layers.N.self_attn.o_proj.weight H Q
language_model.model.layers.N.self_attn.{q_norm,k_norm}.weight A
"""
DENSE = """
language_model.model.layers.N.mlp.{gate_proj,up_proj}.weight E H
language_model.model.layers.N.mlp.down_proj.weight H E
"""
EXPERTS = """
language_model.model.layers.N.mlp.gate.weight X H
language_model.model.layers.N.mlp.experts.N.{gate_proj,up_proj}.weight E H
language_model.model.layers.N.mlp.experts.N.down_proj.weight H E
"""

# Tower: D, layers, F, whether of the 6B kind. Language model: H, layers, heads, groups, E, X.
SMALL, BIG = (1024, 24, 4096, False), (3200, 45, 12800, True)
RELEASED = {
    "internvl3_5-1b": (SMALL, (1024, 28, 16, 8, 3072, 0)),
    "internvl3_5-2b": (SMALL, (2048, 28, 16, 8, 6144, 0)),
    "internvl3_5-4b": (SMALL, (2560, 36, 32, 8, 9728, 0)),
    "internvl3_5-8b": (SMALL, (4096, 36, 32, 8, 12288, 0)),
    "internvl3_5-14b": (SMALL, (5120, 40, 40, 8, 17408, 0)),
    "internvl3_5-38b": (BIG, (5120, 64, 64, 8, 25600, 0)),
    "internvl3_5-30b-a3b": (SMALL, (2048, 48, 32, 4, 768, 128)),
    "internvl3_5-241b-a28b": (BIG, (4096, 94, 64, 4, 1536, 128)),
}
TOYS = {
    "toy": ((96, 3, 384, False), (128, 3, 4, 4, 256, 0)),
    "toy-6b": ((40, 2, 96, True), (48, 4, 4, 2, 96, 0)),
    "toy-moe": ((32, 2, 64, False), (48, 4, 4, 2, 32, 4)),
}
SIZES = [*TOYS, *(pytest.param(name, marks=pytest.mark.slow) for name in RELEASED)]


def published(name: str, layout: Layout) -> dict[str, Shape]:
    """File tensors of a checkpoint of this size."""
    (d, vision_layers, f, is_6b), (h, layers, heads, groups, e, experts) = (RELEASED | TOYS)[name]
    if name in RELEASED:
        head, numbers = 128, {"POSITIONS": 1025, "PATCH": 14, "V": 151_936}
    else:
        head, numbers = 32 if name == "toy" else 16, {"POSITIONS": 17, "PATCH": 8, "V": 512}
    numbers |= {"D": d, "F": f, "H": h, "E": e, "X": experts}
    numbers |= {"A": head, "Q": heads * head, "K": groups * head}
    if layout == "hf":
        text = NATIVE + (NATIVE_6B if is_6b else NATIVE_300M)
    else:
        text = REMOTE + (REMOTE_6B if is_6b else REMOTE_300M)
    text += "\n" + LANGUAGE + (EXPERTS if experts else DENSE)
    text += FLASH if layout == "flash" else ""
    found: dict[str, Shape] = {}
    for pattern, *sizes in map(str.split, filter(None, text.splitlines())):
        shape = tuple(number(size, numbers) for size in sizes)
        counts = [range(vision_layers if pattern.startswith("vision") else layers), range(experts)]
        for file in expand(pattern):
            own = shape[:1] if file.endswith("bias") else shape
            for index in itertools.product(*counts[: file.count(".N.")]):
                found[file.replace(".N.", ".{}.").format(*index)] = own
    return found


def number(text: str, numbers: dict[str, int]) -> int:
    """`16D`, `D` or `16`."""
    count, name = re.fullmatch(r"(\d*)([A-Z]*)", text).groups()  # type: ignore[union-attr]
    return int(count or 1) * (numbers[name] if name else 1)


def expand(name: str) -> list[str]:
    """`a.{b,c}` in every combination."""
    parts = re.split("[{}]", name)  # every second one is a list of choices
    choices = [part.split(",") if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(each) for each in itertools.product(*choices)]


@cache
def modules_of(name: str) -> dict[str, Tensor]:
    """Meta tensors of a size's modules under the table's names; building takes seconds."""
    encoder, language = build_without_memory(get_model_config(name))
    return canonical_state({"encoder": encoder, "language_model": language})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SIZES)
def test_keys_and_shapes_of_both_directions(
    name: str, layout: Layout, single_process_groups: None
) -> None:
    modules, expected = modules_of(name), published(name, layout)
    rows = entries(get_model_config(name), layout=layout)
    assert {key: row.shape for key, row in rows.items()} == {
        key: tuple(tensor.shape) for key, tensor in modules.items()
    }
    names = Counter(file for row in rows.values() for file in row.files)
    assert set(names.values()) == {1}
    files: dict[str, Shape] = {}
    for key, row in rows.items():
        if not row.files:
            assert layout != "flash"
            assert key.startswith(("encoder.connector_16x.", "encoder.vir."))
            continue
        exported = row.kind.to_hf(modules[key])
        files |= {file: tuple(part.shape) for file, part in zip(row.files, exported, strict=True)}
        imported = row.kind.to_megatron(
            [torch.empty(expected[file], device="meta") for file in row.files]
        )
        assert imported.shape == modules[key].shape, key
    assert files == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_key_lists_have_the_published_parameter_counts(name: str) -> None:
    files = {file: math.prod(shape) for file, shape in published(name, "flash").items()}
    prefixes = ("vision_model.", "mlp1.", "language_model.", "mlp2.", ("pooling", "gating"))
    found = [sum(files[file] for file in files if file.startswith(each)) for each in prefixes]
    assert tuple(found) == PUBLISHED[name]
    for layout in ("internvl", "hf"):
        assert sum(map(math.prod, published(name, layout).values())) == sum(found[:3])


def test_vocabulary_is_padded_on_the_megatron_side_only() -> None:
    rows = entries(get_model_config("toy"), layout="hf", padded_vocab_size=640)
    row = rows["language_model.gpt.output_layer.weight"]
    assert row.shape == (640, 128)
    assert row.kind.to_hf(torch.empty(row.shape, device="meta"))[0].shape == (512, 128)


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
