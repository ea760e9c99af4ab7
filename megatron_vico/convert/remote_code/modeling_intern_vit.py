"""InternViT, both kinds: 300M (LayerNorm, qkv bias) and 6B (RMSNorm, norm of queries and keys). For
inference.

Module names are those of the released checkpoints. There is no drop path, which acts in training
only. Shapes: N tiles, S pixels of a tile's side, P patches of a tile, L = 1 + P positions, D
channels. From megatron_vico, Apache-2.0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_internvl_chat import InternVisionConfig


class InternVisionEmbeddings(nn.Module):
    """Pixels to patches, with a class token in front and positions added."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        width, patch_size = config.hidden_size, config.patch_size
        num_positions = 1 + (config.image_size // patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, width, kernel_size=patch_size, stride=patch_size
        )
        self.position_embedding = nn.Parameter(torch.randn(1, num_positions, width))

    def forward(self, pixel_values_N3SS: Tensor) -> Tensor:
        """[N, 3, S, S] to [N, L, D]."""
        patches_NPD = self.patch_embedding(pixel_values_N3SS).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(len(patches_NPD), -1, -1)
        return torch.cat([class_token, patches_NPD], dim=1) + self.position_embedding


class InternAttention(nn.Module):
    """Attention among all positions of a tile."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        self.qk_normalization = config.qk_normalization
        if self.qk_normalization:  # over all channels, before they are split into heads
            self.q_norm = nn.RMSNorm(width, eps=config.layer_norm_eps)
            self.k_norm = nn.RMSNorm(width, eps=config.layer_norm_eps)

    def forward(self, hidden_NLD: Tensor) -> Tensor:
        """[N, L, D] to [N, L, D]."""
        query, key, value = self.qkv(hidden_NLD).chunk(3, dim=-1)
        if self.qk_normalization:
            query, key = self.q_norm(query), self.k_norm(key)
        heads = [
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value)
        ]
        attended: Tensor = self.proj(
            F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        )
        return attended


class InternMLP(nn.Module):
    """Two layers with the exact (erf) GELU between them."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_NLD: Tensor) -> Tensor:
        """[N, L, D] to [N, L, D]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(hidden_NLD)))
        return out


class InternVisionEncoderLayer(nn.Module):
    """One layer; each branch is scaled channel by channel before it is added."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        norm = nn.LayerNorm if config.norm_type == "layer_norm" else nn.RMSNorm
        self.attn = InternAttention(config)
        self.mlp = InternMLP(config)
        self.norm1 = norm(width, eps=config.layer_norm_eps)
        self.norm2 = norm(width, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(torch.full((width,), float(config.initializer_factor)))
        self.ls2 = nn.Parameter(torch.full((width,), float(config.initializer_factor)))

    def forward(self, hidden_NLD: Tensor) -> Tensor:
        """[N, L, D] to [N, L, D]."""
        hidden_NLD = hidden_NLD + self.attn(self.norm1(hidden_NLD)) * self.ls1
        return hidden_NLD + self.mlp(self.norm2(hidden_NLD)) * self.ls2


class InternVisionEncoder(nn.Module):
    """The stack of layers; the released towers have no norm after it."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            InternVisionEncoderLayer(config) for _ in range(config.num_hidden_layers)
        )

    def forward(self, hidden_NLD: Tensor) -> Tensor:
        """[N, L, D] to [N, L, D]."""
        for layer in self.layers:
            hidden_NLD = layer(hidden_NLD)
        return hidden_NLD


class InternVisionModel(nn.Module):
    """The tower."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = InternVisionEmbeddings(config)
        self.encoder = InternVisionEncoder(config)

    def forward(self, pixel_values_N3SS: Tensor) -> Tensor:
        """Features of the patches, the class token dropped.

        Args:
            pixel_values_N3SS: [N, 3, S, S], normalised, S the `image_size` of the configuration.

        Returns:
            [N, P, D], patches row by row.

        Raises:
            ValueError: if tiles are of another size; position embeddings are not interpolated.
        """
        side = self.config.image_size
        if pixel_values_N3SS.shape[1:] != (self.config.num_channels, side, side):
            expected = f"[N, {self.config.num_channels}, {side}, {side}]"
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values_N3SS.shape)}, expected {expected}."
            )
        features: Tensor = self.encoder(self.embeddings(pixel_values_N3SS))[:, 1:]
        return features
