"""Our model as transformers' InternVLForConditionalGeneration: its configuration and weights.

Written apart from convert/, so that the parity test and the converter cannot share a mistake.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_vico.config.registry import LanguageConfig, ModelConfig
from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.models.language_model import LanguageInputs, LanguageModel
from tests.toy_models import pack, random_tiles


def transformers_config(model: ModelConfig) -> InternVLConfig:
    """transformers' configuration of the model."""
    vision, language = model.vision, model.language
    return InternVLConfig(
        vision_config={
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "intermediate_size": vision.ffn_hidden_size,
            "image_size": [vision.image_size] * 2,
            "patch_size": [vision.patch_size] * 2,
            "attention_bias": vision.qkv_bias,
            "use_qk_norm": vision.qk_norm,
            "norm_type": vision.norm_type,
            "layer_norm_eps": vision.norm_eps,
            "hidden_act": "gelu",
            "use_absolute_position_embeddings": True,
        },
        text_config=_text_config(language),
        image_token_id=model.image_token_id,
        image_seq_length=model.visual_tokens_per_tile,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )


def transformers_model(
    encoder: VisionEncoder, language_model: LanguageModel
) -> InternVLForConditionalGeneration:
    """transformers' model with our weights; every one of its parameters is set, or this raises."""
    model = encoder.model
    hf = InternVLForConditionalGeneration(transformers_config(model)).eval()
    weights = dict(_vision_weights(encoder)) | dict(_language_weights(language_model))
    missing, unexpected = hf.load_state_dict(weights, strict=False)
    assert not missing, missing
    assert not unexpected, unexpected
    return hf


def inputs_of(samples: list[Tensor], image_token_id: int) -> LanguageInputs:
    """A pack of samples, given as token ids, every row of which is asked for."""
    token_ids, lens = torch.cat(samples), tuple(len(each) for each in samples)
    return LanguageInputs(
        token_ids_T=token_ids,
        visual_positions_V=(token_ids == image_token_id).nonzero()[:, 0],
        cu_seqlens=torch.tensor([0, *lens]).cumsum(0).int(),
        document_lens=lens,
        response_rows_R=torch.arange(len(token_ids)),
        shard_len=len(token_ids),
    )


@torch.no_grad()
def assert_equal_logits(
    folder: Path, encoder: VisionEncoder, language_model: LanguageModel
) -> None:
    """What transformers loads from a folder says of two tiles what our modules say."""
    model = encoder.model
    loaded, loading = InternVLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    num_tokens, tile = 60, range(model.visual_tokens_per_tile)
    positions = [*(3 + place for place in tile), *(5 + len(tile) + place for place in tile)]
    inputs = pack([num_tokens], visual_positions=positions)
    token_ids = inputs.token_ids_T.clone()
    token_ids[inputs.visual_positions_V] = model.image_token_id
    pixels = encoder.normalise(random_tiles(model, 2))
    expected = loaded.eval()(
        input_ids=token_ids[None],
        pixel_values=pixels,
        attention_mask=torch.ones(1, num_tokens, dtype=torch.int64),
    ).logits[0]
    tokens = encoder.visual_tokens(encoder.features(pixels), None)
    found = language_model.response_logits(language_model(inputs, tokens))
    assert found.size(-1) == model.language.vocab_size
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)  # measured: at most 6e-6


def _text_config(language: LanguageConfig) -> Qwen3Config | Qwen3MoeConfig:
    common = {
        "hidden_size": language.hidden_size,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_query_groups,
        "head_dim": language.head_dim,
        "intermediate_size": language.ffn_hidden_size,
        "vocab_size": language.vocab_size,
        "rope_parameters": {"rope_type": "default", "rope_theta": language.rope_theta},
        "rms_norm_eps": language.norm_eps,
        "max_position_embeddings": language.max_position_embeddings,
        "tie_word_embeddings": False,
    }
    if language.num_experts is None:
        return Qwen3Config(**common)
    return Qwen3MoeConfig(
        **common,
        num_experts=language.num_experts,
        num_experts_per_tok=language.moe_top_k,
        moe_intermediate_size=language.moe_ffn_hidden_size,
        norm_topk_prob=True,
    )


def _split_qkv(weight: Tensor, *, groups: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Out of mcore's fused rows: for each group its queries, its key, its value."""
    per_group = heads // groups
    rows = weight.view(groups, per_group + 2, -1, *weight.shape[1:])
    parts = (rows[:, :per_group], rows[:, per_group], rows[:, per_group + 1])
    query, key, value = (part.reshape(-1, *weight.shape[1:]) for part in parts)
    return query, key, value


def _vision_weights(encoder: VisionEncoder) -> Iterator[tuple[str, Tensor]]:
    tower, vit = "model.vision_tower.", dict(encoder.vit.named_parameters())
    yield tower + "embeddings.cls_token", vit["class_token"]
    yield tower + "embeddings.position_embeddings", vit["position_embedding"]
    for kind in ("weight", "bias"):
        projection = f"{tower}embeddings.patch_embeddings.projection.{kind}"
        yield projection, vit[f"patch_embedding.{kind}"]
        for hf, ours in (("layer_norm", "norm"), ("linear_1",) * 2, ("linear_2",) * 2):
            parameter = encoder.connector_4x.get_parameter(f"{ours}.{kind}")
            yield f"model.multi_modal_projector.{hf}.{kind}", parameter
    names = {
        "input_layernorm": "layernorm_before",
        "pre_mlp_layernorm": "layernorm_after",
        "self_attention.linear_proj": "attention.projection_layer",
        "self_attention.q_layernorm": "attention.q_norm",
        "self_attention.k_layernorm": "attention.k_norm",
        "mlp.linear_fc1": "mlp.fc1",
        "mlp.linear_fc2": "mlp.fc2",
    }
    heads = encoder.model.vision.num_heads
    for index, layer in enumerate(encoder.vit.transformer.layers):
        prefix = f"{tower}encoder.layer.{index}."
        for name, param in layer.named_parameters():
            module, _, kind = name.rpartition(".")
            if module == "self_attention.linear_qkv":
                split = _split_qkv(param, groups=heads, heads=heads)
                for part, value in zip("qkv", split, strict=True):
                    yield f"{prefix}attention.{part}_proj.{kind}", value
            elif kind == "scale":
                yield prefix + {"self_attn_bda": "lambda_1", "mlp_bda": "lambda_2"}[module], param
            else:
                yield f"{prefix}{names[module]}.{kind}", param


def _language_weights(language_model: LanguageModel) -> Iterator[tuple[str, Tensor]]:
    language, gpt = language_model.language, language_model.gpt
    real = slice(language.vocab_size)  # without the rows that pad the vocabulary
    yield "model.language_model.embed_tokens.weight", gpt.embedding.word_embeddings.weight[real]
    yield "model.language_model.norm.weight", gpt.decoder.final_layernorm.weight
    yield "lm_head.weight", gpt.output_layer.weight[real]
    for index, layer in enumerate(gpt.decoder.layers):
        prefix, params = f"model.language_model.layers.{index}.", dict(layer.named_parameters())
        yield prefix + "input_layernorm.weight", params["input_layernorm.weight"]
        yield prefix + "post_attention_layernorm.weight", params["pre_mlp_layernorm.weight"]
        qkv = params["self_attention.linear_qkv.weight"]
        split = _split_qkv(qkv, groups=language.num_query_groups, heads=language.num_heads)
        for part, value in zip("qkv", split, strict=True):
            yield f"{prefix}self_attn.{part}_proj.weight", value
        yield prefix + "self_attn.o_proj.weight", params["self_attention.linear_proj.weight"]
        for part in "qk":
            norm = params[f"self_attention.{part}_layernorm.weight"]
            yield f"{prefix}self_attn.{part}_norm.weight", norm
        if language.num_experts is None:
            gate, up = params["mlp.linear_fc1.weight"].chunk(2)
            yield prefix + "mlp.gate_proj.weight", gate
            yield prefix + "mlp.up_proj.weight", up
            yield prefix + "mlp.down_proj.weight", params["mlp.linear_fc2.weight"]
        else:
            yield prefix + "mlp.gate.weight", params["mlp.router.weight"]
            experts = range(language.num_experts)
            for name, layer_name in (("gate_up_proj", "linear_fc1"), ("down_proj", "linear_fc2")):
                keys = [f"mlp.experts.local_experts.{i}.{layer_name}.weight" for i in experts]
                yield f"{prefix}mlp.experts.{name}", torch.stack([params[key] for key in keys])
