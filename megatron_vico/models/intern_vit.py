"""InternViT, both kinds (300M and 6B), on megatron-core's TransformerBlock.

Tiles stay first, [N, S, D] with S = 1 + P: nothing in mcore's layer but the core attention looks at
the order of the first two dimensions, and this order keeps a tile's memory together.

Shapes: N tiles, P patches of a tile, D channels.
"""

import functools
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_vico.config.registry import VisionConfig
from megatron_vico.models.attention import TileAttention
from megatron_vico.models.layers import BiasGeluMLP, Layer, LayerScaleAdd
from megatron_vico.models.norms import AllHeadsRMSNorm, LayerNorm, RMSNorm


class InternViT(MegatronModule):
    """From normalised pixels to the last hidden state of each patch, without a final norm."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        vision: VisionConfig,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        width, dtype = vision.hidden_size, config.params_dtype
        std = config.init_method_std
        self.class_token = nn.Parameter(torch.randn(1, 1, width, dtype=dtype) * std)
        size = vision.patch_size
        self.patch_embedding = nn.Conv2d(3, width, size, stride=size, dtype=dtype)
        positions = torch.randn(1, 1 + vision.num_patches, width, dtype=dtype)
        self.position_embedding = nn.Parameter(positions * std)
        self.transformer = TransformerBlock(
            config,
            _block_spec(vision, drop_path_rate=config.drop_path_rate, dtype=dtype),
            post_layer_norm=False,
            pg_collection=pg_collection,
        )

    def forward(self, tiles_N3SS: Tensor) -> Tensor:
        """[N, 3, S, S] normalised pixels to [N, P, D], the class token dropped."""
        patches_NPD = self.patch_embedding(tiles_N3SS).flatten(2).transpose(1, 2)
        class_N1D = self.class_token.expand(patches_NPD.size(0), -1, -1)
        hidden = torch.cat([class_N1D, patches_NPD], dim=1) + self.position_embedding
        features: Tensor = self.transformer(hidden_states=hidden, attention_mask=None)
        return features[:, 1:]


def _block_spec(
    vision: VisionConfig, *, drop_path_rate: float, dtype: torch.dtype
) -> TransformerBlockSubmodules:
    """One spec a layer: drop path grows linearly from 0 to its rate."""
    norm = LayerNorm if vision.norm_type == "layer_norm" else RMSNorm
    last = max(vision.num_layers - 1, 1)
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=functools.partial(_qkv_linear, qkv_bias=vision.qkv_bias),
            core_attention=TileAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=AllHeadsRMSNorm if vision.qk_norm else None,
            k_layernorm=AllHeadsRMSNorm if vision.qk_norm else None,
        ),
    )
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    layers = []
    for index in range(vision.num_layers):
        add = ModuleSpec(
            module=LayerScaleAdd,
            params={
                "hidden_size": vision.hidden_size,
                "init": vision.layer_scale_init,
                "drop_path_rate": drop_path_rate * index / last,
                "dtype": dtype,
            },
        )
        submodules = TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=add,
            pre_mlp_layernorm=norm,
            mlp=functools.partial(BiasGeluMLP.as_mlp_submodule, submodules=linear),
            mlp_bda=add,
        )
        layers.append(ModuleSpec(module=Layer, submodules=submodules))
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=None)


def _qkv_linear(*args: Any, qkv_bias: bool, bias: bool, **kwargs: Any) -> ColumnParallelLinear:
    # InternViT-6B has biases everywhere but here, which mcore's config cannot say.
    return ColumnParallelLinear(*args, bias=qkv_bias, **kwargs)
