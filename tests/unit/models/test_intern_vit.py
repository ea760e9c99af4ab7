"""Layer scale, drop path and the structure of the two kinds of tower."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vico.config.registry import get_model_config
from megatron_vico.models.build import build_vision_encoder, vision_transformer_config
from megatron_vico.models.layers import LayerScaleAdd
from tests.toy_models import make_encoder, random_tiles


def add_scaled(
    x: Tensor, bias: Tensor | None, residual: Tensor, *, drop_path_rate: float = 0.0
) -> tuple[Tensor, Tensor]:
    """In training and in evaluation, with channels scaled by SCALE."""
    add = LayerScaleAdd(hidden_size=4, init=0.1, drop_path_rate=drop_path_rate, dtype=torch.float32)
    with torch.no_grad():
        add.scale.copy_(SCALE)
        return tuple(add(training, False)((x, bias), residual, 0.0) for training in (True, False))


SCALE = torch.tensor([0.5, -1.0, 2.0, 0.0])


def test_layer_scale_multiplies_output_and_bias_before_the_residual() -> None:
    x, bias, residual = torch.randn(3, 2, 4), torch.randn(4), torch.randn(3, 2, 4)
    for each, branch in ((bias, x + bias), (None, x)):
        for found in add_scaled(x, each, residual):
            torch.testing.assert_close(found, residual + branch * SCALE)


def test_drop_path_leaves_the_branch_out_for_whole_tiles() -> None:
    torch.manual_seed(0)
    x, bias, residual = torch.randn(4000, 2, 4), torch.randn(4), torch.randn(4000, 2, 4)
    trained, evaluated = add_scaled(x, bias, residual, drop_path_rate=0.25)
    branch = (x + bias) * SCALE
    dropped = (trained == residual).flatten(1).all(dim=1)
    torch.testing.assert_close(trained[~dropped], (residual + branch / 0.75)[~dropped])
    # 0.25 of 4,000 with a standard deviation of 0.007
    assert 0.22 < dropped.float().mean() < 0.28
    torch.testing.assert_close(evaluated, residual + branch)


def test_drop_path_grows_linearly_over_the_layers_and_is_off_in_evaluation(
    single_process_groups: None,
) -> None:
    model = get_model_config("toy")
    encoder, without = make_encoder(model, drop_path_rate=0.4), make_encoder(model)
    layers = encoder.vit.transformer.layers
    assert [layer.self_attn_bda.drop_path_rate for layer in layers] == [0.0, 0.2, 0.4]
    assert [layer.mlp_bda.drop_path_rate for layer in layers] == [0.0, 0.2, 0.4]
    pixels = encoder.normalise(random_tiles(model, 6))
    assert torch.equal(encoder.eval().features(pixels), without.features(pixels))
    assert not torch.equal(encoder.train().features(pixels), without.features(pixels))


@pytest.mark.parametrize(
    ("name", "scale", "qkv_bias", "norm_bias", "qk_norm"),
    [("toy", 1.0, 1, 1, 0), ("toy-6b", 0.1, 0, 0, 1)],
)
def test_the_two_kinds_of_tower(
    name: str,
    scale: float,
    qkv_bias: bool,
    norm_bias: bool,
    qk_norm: bool,
    single_process_groups: None,
) -> None:
    model = get_model_config(name)
    width = model.vision.hidden_size
    encoder = build_vision_encoder(model, vision_transformer_config(model))
    for layer in encoder.vit.transformer.layers:
        for add in (layer.self_attn_bda, layer.mlp_bda):
            assert add.scale.tolist() == pytest.approx([scale] * width)
    params = dict(encoder.vit.transformer.layers[0].named_parameters())
    assert ("self_attention.linear_qkv.bias" in params) == qkv_bias
    assert ("input_layernorm.bias" in params) == norm_bias
    assert "self_attention.linear_proj.bias" in params
    assert "mlp.linear_fc1.bias" in params
    # All heads together.
    assert [params[key].shape for key in params if "q_layernorm" in key] == [(width,)] * qk_norm
    assert not any("final" in key for key, _ in encoder.named_parameters())


@pytest.mark.slow
def test_elementwise_functions_are_one_kernel_each_way() -> None:
    """Backward, the sums over rows that a bias and a scale need are kernels of their own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.unit.models.fused_kernels"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        # A backward pass from a cache would count with the forward pass.
        env=os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
        timeout=600,
        check=True,
    )
    counts = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    assert counts == [[1, 3], [1, 4]]
