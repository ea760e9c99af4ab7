"""Visual tokens and router logits against the released Flash modules, written from their code.

transformers has no Flash model. The modules here carry the released names, so that a state dict of
a Flash checkpoint would load into them: mlp1, mlp2, pooling_before_gating, gating.
"""

import pytest
import torch
from torch import Tensor, nn

from megatron_vico.config.registry import get_model_config
from megatron_vico.models.internvl import VisionEncoder
from tests.toy_models import make_encoder, random_tiles


class ReleasedFlash(nn.Module):
    """Everything between the ViT and the language model."""

    def __init__(self, vit: int, llm: int, num_heads: int) -> None:
        super().__init__()
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(4 * vit), nn.Linear(4 * vit, llm), nn.GELU(), nn.Linear(llm, llm)
        )
        self.mlp2 = nn.Sequential(
            *(nn.LayerNorm(16 * vit), nn.Linear(16 * vit, 2 * llm), nn.GELU(), nn.Dropout(0.1)),
            *(nn.Linear(2 * llm, 2 * llm), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * llm, llm)),
        )
        self.pooling_before_gating, self.gating = nn.Module(), nn.Module()
        self.pooling_before_gating.query_token = nn.Parameter(torch.zeros(1, vit))
        for i in range(1, 5):
            attention = nn.MultiheadAttention(vit, num_heads=num_heads, batch_first=True)
            setattr(self.pooling_before_gating, f"attn{i}", attention)
            setattr(self.pooling_before_gating, f"norm{i}", nn.LayerNorm(vit))
            block = nn.Sequential(
                *(nn.Linear(vit, 4 * vit), nn.GELU(), nn.Dropout(0.1)),
                *(nn.Linear(4 * vit, vit), nn.Dropout(0.1), nn.LayerNorm(vit)),
            )
            setattr(self.gating, f"block{i}", block)
        self.gating.gate = nn.Sequential(nn.LayerNorm(vit), nn.Linear(vit, 2))

    @staticmethod
    def pixel_shuffle(x: Tensor, scale_factor: float) -> Tensor:
        n, w, h, c = x.size()
        x = x.view(n, w, int(h * scale_factor), int(c / scale_factor))
        x = x.permute(0, 2, 1, 3).contiguous()
        x = x.view(n, int(h * scale_factor), int(w * scale_factor), int(c / scale_factor**2))
        return x.permute(0, 2, 1, 3).contiguous()  # the step that makes it version 2

    def tokens(self, vit_embeds: Tensor, scale_factor: float, mlp: nn.Module) -> Tensor:
        side = int(vit_embeds.shape[1] ** 0.5)
        x = self.pixel_shuffle(vit_embeds.reshape(len(vit_embeds), side, side, -1), scale_factor)
        return mlp(x.reshape(len(x), -1, x.shape[-1]))

    def gate_logits(self, vit_embeds: Tensor) -> Tensor:
        pooling = self.pooling_before_gating
        query = pooling.query_token.unsqueeze(0).expand(len(vit_embeds), -1, -1)
        out1 = pooling.norm1(pooling.attn1(query, vit_embeds, vit_embeds)[0])
        out2 = pooling.norm2(pooling.attn2(out1, vit_embeds, vit_embeds)[0])
        out3 = pooling.norm2(pooling.attn2(out2, vit_embeds, vit_embeds)[0])
        out4 = pooling.norm2(pooling.attn2(out3, vit_embeds, vit_embeds)[0])
        x = out4.squeeze(1)
        for i in range(1, 5):
            x = x + self.gating.get_submodule(f"block{i}")(x)
        return self.gating.gate(x)


def released(encoder: VisionEncoder) -> ReleasedFlash:
    model = encoder.model
    sizes = (model.vision.hidden_size, model.language.hidden_size, model.vir_num_heads)
    flash = ReleasedFlash(*sizes).eval()
    names = {
        "mlp1": ("connector_4x", {"0": "norm", "1": "linear_1", "3": "linear_2"}),
        "mlp2": ("connector_16x", {"0": "norm", "1": "linear_1", "4": "linear_2", "7": "linear_3"}),
    }
    weights = {}
    for name in flash.state_dict():
        module, _, rest = name.partition(".")
        if module in names:
            index, _, kind = rest.partition(".")
            ours, layers = names[module]
            weights[name] = encoder.get_parameter(f"{ours}.{layers[index]}.{kind}")
        else:
            child = {"pooling_before_gating": "pooling", "gating": "gating"}[module]
            weights[name] = encoder.get_parameter(f"vir.{child}.{rest}")
    flash.load_state_dict(weights)
    others = [param for name, param in encoder.named_parameters() if not name.startswith("vit.")]
    assert sum(map(Tensor.numel, weights.values())) == sum(map(Tensor.numel, others))
    return flash


@torch.no_grad()
@pytest.mark.parametrize("name", ["toy", "toy-6b"])
def test_visual_tokens_and_router_equal_the_released_modules(
    name: str, single_process_groups: None
) -> None:
    encoder = make_encoder(get_model_config(name)).eval()
    flash = released(encoder)
    features = encoder.features(encoder.normalise(random_tiles(encoder.model, 6)))
    plan = torch.tensor([True, False, False, True, True, False])
    kept = flash.tokens(features, 0.5, flash.mlp1)
    compressed = flash.tokens(features, 0.25, flash.mlp2)
    expected = torch.cat([compressed[i] if plan[i] else kept[i] for i in range(6)])
    tokens, logits = encoder.visual_tokens(features, plan), encoder.vir(features)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)  # measured 1.2e-6
    expected_logits = flash.gate_logits(features)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)  # measured 1e-6
    # The dead submodules change nothing, and the live ones do.
    for index, changes in ((3, False), (4, False), (2, True), (1, True)):
        encoder.get_parameter(f"vir.pooling.norm{index}.weight").add_(1.0)
        assert torch.equal(encoder.vir(features), logits) != changes
        encoder.get_parameter(f"vir.pooling.norm{index}.weight").sub_(1.0)
