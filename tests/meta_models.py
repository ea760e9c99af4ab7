"""Models of any size without memory: every tensor is on the meta device."""

from typing import Any

from torch.overrides import TorchFunctionMode

from megatron_vico.config.registry import ModelConfig
from megatron_vico.models.build import (
    build_language_model,
    build_vision_encoder,
    language_transformer_config,
    vision_transformer_config,
)
from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.models.language_model import LanguageModel


class NoMemory(TorchFunctionMode):
    """Every new tensor goes to the meta device, also one that names its device."""

    FACTORIES = ("empty", "zeros", "ones", "full", "rand", "randn", "arange", "tensor")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", "") in self.FACTORIES:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_without_memory(model: ModelConfig) -> tuple[VisionEncoder, LanguageModel]:
    """Both modules of a model; needs process groups of one."""
    with NoMemory():
        encoder = build_vision_encoder(
            model, vision_transformer_config(model, perform_initialization=False)
        )
        language_model = build_language_model(
            model,
            language_transformer_config(model, perform_initialization=False),
            attention="sdpa",
        )
    assert all(
        param.is_meta for module in (encoder, language_model) for param in module.parameters()
    )
    return encoder, language_model
