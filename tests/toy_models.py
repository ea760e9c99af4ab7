"""Tiny models with random weights, and packs for them, that the model and parity tests share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor, nn

from megatron_vico.config.registry import ModelConfig, get_model_config
from megatron_vico.data.encode.sample_encoder import EncodingSettings
from megatron_vico.data.encode.tokenizer import load_tokenizer, train_sentencepiece
from megatron_vico.data.samples import PackedStream
from megatron_vico.inference.engine import Engine
from megatron_vico.models.build import (
    build_language_model,
    build_vision_encoder,
    language_transformer_config,
    vision_transformer_config,
)
from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.models.language_model import LanguageInputs, LanguageModel
from megatron_vico.parallel.streams import StreamCut, language_inputs

# Both kinds of vision tower with both kinds of language model.
KINDS = [(vision, language) for vision in ("toy", "toy-6b") for language in ("toy", "toy-moe")]


def combine(vision: str, language: str) -> ModelConfig:
    """One toy's tower and another's language model, with a rope_theta that is nobody's default."""
    chosen = replace(get_model_config(language).language, rope_theta=3e5)
    return replace(get_model_config(vision), name=f"{vision} and {language}", language=chosen)


def make_encoder(
    model: ModelConfig, *, seed: int = 0, drop_path_rate: float = 0.0
) -> VisionEncoder:
    """An encoder whose every parameter is random."""
    encoder = build_vision_encoder(
        model, vision_transformer_config(model, drop_path_rate=drop_path_rate)
    )
    return randomise(encoder, seed=seed)


def make_language_model(model: ModelConfig, *, seed: int = 1) -> LanguageModel:
    """A language model whose every parameter is random."""
    return randomise(
        build_language_model(model, language_transformer_config(model), attention="sdpa"), seed=seed
    )


def make_engine(folder: Path, *, size: str = "toy", **fields: Any) -> Engine:
    """A toy that reacts to its images and ends some of its answers; `fields` are of `Engine`."""
    # Weights come from megatron-core's own random state, which other tests move.
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    torch.manual_seed(0)
    text = ["What is it? And now? Yes, no, two tiles. user assistant system"] * 50
    path = train_sentencepiece(text, model_prefix=folder / "toy", vocab_size=320)
    tokenizer = load_tokenizer(path)
    model = get_model_config(size)
    language_model = build_language_model(
        model, language_transformer_config(model), attention="sdpa"
    )
    encoder = build_vision_encoder(model, vision_transformer_config(model))
    with torch.no_grad():
        # Fresh weights hardly react to the image, nor ever stop: make visual tokens loud and the
        # end mark likely.
        encoder.connector_4x.linear_2.weight.mul_(30)
        encoder.connector_16x.linear_3.weight.mul_(30)
        language_model.gpt.output_layer.weight[tokenizer.eos_id].mul_(2.5)
        # Likewise the router: its head decides by what it sees, and not by its bias alone.
        encoder.vir.gating.gate[1].weight.mul_(20)
    settings = EncodingSettings(
        image_size=32, max_dynamic_patch=4, use_thumbnail=True, tile_tags="numbered"
    )
    return Engine(
        encoder=encoder,
        language_model=language_model,
        tokenizer=tokenizer,
        model=model,
        settings=settings,
        **fields,
    )


def randomise[M: nn.Module](module: M, *, seed: int) -> M:
    """Values of the size that trained parameters have, biases and norms too: none is a no-op."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in module.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if param.dim() > 1:
                param.copy_(noise / param.flatten(1).size(1) ** 0.5)
            elif name.endswith((".weight", ".scale")):
                param.copy_(1 + 0.2 * noise)
            else:
                param.copy_(0.2 * noise)
    return module


def error(value: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest expected value."""
    difference = (value.double() - expected.double()).abs().max()
    return (difference / expected.abs().max().clamp_min(1e-12)).item()


@contextmanager
def kept_for_backward() -> Iterator[list[Tensor]]:
    """The tensors that autograd saves in this context."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def random_tiles(model: ModelConfig, num_tiles: int, *, seed: int = 0) -> Tensor:
    """[N, 3, S, S] uint8."""
    size = model.vision.image_size
    return torch.randint(
        0,
        256,
        (num_tiles, 3, size, size),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )


def pack(
    document_lens: Sequence[int],
    *,
    visual_positions: Sequence[int] = (),
    response_rows: Sequence[int] | None = None,
    seed: int = 0,
    cut: StreamCut | None = None,
    device: torch.device | str = "cpu",
) -> LanguageInputs:
    """A pack of random tokens; by default every row is wanted, and the pack is whole."""
    num_tokens = sum(document_lens)
    generator = torch.Generator().manual_seed(seed)
    stream = PackedStream(
        compressed=torch.zeros(0, dtype=torch.bool),
        token_ids=torch.randint(6, 512, (num_tokens,), generator=generator),
        visual_positions=torch.tensor(visual_positions, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, *document_lens]).cumsum(0).int(),
        response_rows=torch.tensor(
            range(num_tokens) if response_rows is None else response_rows, dtype=torch.int64
        ),
    )
    return language_inputs(stream, cut or StreamCut(), torch.device(device))
