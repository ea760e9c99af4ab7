"""The vision side of InternVL3.5-Flash, from pixels to visual tokens.

Shapes: N tiles, S pixels of a tile's side, P patches of a tile, D channels of the ViT, V visual
tokens of all tiles, H channels of the language model.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vico.config.registry import IMAGENET_MEAN, IMAGENET_STD, ModelConfig
from megatron_vico.models.connector import Connector4x, Connector16x
from megatron_vico.models.intern_vit import InternViT
from megatron_vico.models.to_device import to_device
from megatron_vico.models.vir import ViR


class VisionEncoder(MegatronModule):
    """Tower, both connectors and router; a plan says which connector a tile goes through."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        model: ModelConfig,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        self.model = model
        dtype, vision_size = config.params_dtype, model.vision.hidden_size
        sizes = {"vision_size": vision_size, "language_size": model.language.hidden_size}
        self.vit = InternViT(config, vision=model.vision, pg_collection=pg_collection)
        self.connector_4x = Connector4x(**sizes).to(dtype)
        self.connector_16x = Connector16x(**sizes).to(dtype)
        self.vir = ViR(hidden_size=vision_size, num_heads=model.vir_num_heads).to(dtype)

    def normalise(self, tiles_uint8: Tensor) -> Tensor:
        """[N, 3, S, S] pixels 0..255 to ImageNet-normalised values in the weights' dtype."""
        mean, std = (
            to_device(torch.tensor(x).view(3, 1, 1), tiles_uint8.device)
            for x in (IMAGENET_MEAN, IMAGENET_STD)
        )
        pixels = tiles_uint8.to(torch.float32).div_(255.0).sub_(mean).div_(std)
        return pixels.to(self.config.params_dtype)

    def features(self, tiles_N3SS: Tensor) -> Tensor:
        """ViT outputs of normalised tiles, [N, 3, S, S] to [N, P, D]."""
        vision = self.model.vision
        if not len(tiles_N3SS):  # text only; mcore's attention cannot reshape an empty batch
            return tiles_N3SS.new_zeros(0, vision.num_patches, vision.hidden_size)
        features_NPD: Tensor = self.vit(tiles_N3SS)
        return features_NPD if torch.is_grad_enabled() else features_NPD.detach()

    def visual_tokens(self, features_NPD: Tensor, compressed_N: Tensor | None) -> Tensor:
        """Visual tokens [V, H] of all tiles in tile order, those of a tile together and row by row.

        The plan [N] bool is on the CPU, True = compressed; None: nothing is. A connector that no
        tile goes through is not touched.
        """
        num_tiles = features_NPD.size(0)
        assert compressed_N is None or compressed_N.shape == (num_tiles,), "one entry a tile"
        num_compressed = 0 if compressed_N is None else int(compressed_N.sum())
        if num_tiles == 0:
            return features_NPD.new_zeros(0, self.model.language.hidden_size)
        if compressed_N is None or num_compressed == 0:
            return self.connector_4x(features_NPD).flatten(0, 1)
        if num_compressed == num_tiles:
            return self.connector_16x(features_NPD).flatten(0, 1)
        kept, compressed = (~compressed_N).nonzero().squeeze(1), compressed_N.nonzero().squeeze(1)
        device = features_NPD.device
        tokens_kept = self.connector_4x(features_NPD[to_device(kept, device)])
        tokens_compressed = self.connector_16x(features_NPD[to_device(compressed, device)])
        counts_N = self.tokens_per_tile(compressed_N)
        first_N = counts_N.cumsum(0) - counts_N
        tokens = tokens_kept.new_zeros(int(counts_N.sum()), tokens_kept.size(-1))
        for chosen, part in ((kept, tokens_kept), (compressed, tokens_compressed)):
            rows = first_N[chosen, None] + torch.arange(part.size(1))
            tokens = tokens.index_copy(0, to_device(rows.flatten(), device), part.flatten(0, 1))
        return tokens

    def tokens_per_tile(self, compressed_N: Tensor) -> Tensor:
        """Visual tokens of each tile under a plan, [N] int64."""
        return torch.where(
            compressed_N, self.model.compressed_tokens_per_tile, self.model.visual_tokens_per_tile
        )
