"""The model that is trained: encoder and language model, what of them is frozen, and their DDP wrappers."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_vico.config.schema import Module
from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.models.language_model import LanguageModel
from megatron_vico.models.vir import is_dead
from megatron_vico.parallel.groups import Groups


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Encoder and language model; the DDP wrapper of a module is absent where all of it is frozen."""

    encoder: VisionEncoder
    language_model: LanguageModel
    trained: frozenset[Module]
    encoder_ddp: DistributedDataParallel | None
    language_ddp: DistributedDataParallel | None

    @property
    def schedule_model(self) -> nn.Module:
        """The language model as mcore's schedules take it."""
        return self.language_ddp if self.language_ddp is not None else self.language_model

    @property
    def ddp_modules(self) -> list[DistributedDataParallel]:
        """What has gradients: language model first, then encoder."""
        return [module for module in (self.language_ddp, self.encoder_ddp) if module is not None]

    def zero_grad(self) -> None:
        """Zero the gradient buffers; the optimizer's own `zero_grad` must be called as well."""
        for module in self.ddp_modules:
            module.zero_grad_buffer()

    def finish_grad_sync(self) -> None:
        """Reduce the encoder's gradients; the language model's are reduced by the schedule, when it has one."""
        if self.encoder_ddp is not None:
            self.encoder_ddp.finish_grad_sync()

    def train_mode(self) -> None:
        """Training behaviour (drop path) in what is trained, inference behaviour in what is frozen."""
        self.encoder.eval()
        self.language_model.train("language_model" in self.trained)
        for name in ("vit", "connector_4x", "connector_16x", "vir"):
            if name in self.trained:
                getattr(self.encoder, name).train()


def parameters_of(module: Module, encoder: VisionEncoder, language_model: LanguageModel) -> Iterator[nn.Parameter]:
    """Parameters of one of the five modules that are trained or frozen as a whole; ViR's dead ones left out."""
    owner: nn.Module = language_model if module == "language_model" else getattr(encoder, module)
    for name, param in owner.named_parameters():
        # Frozen for good: with a gradient buffer of their own, weight decay would change them.
        if module != "vir" or not is_dead(name):
            yield param


def wrap(
    encoder: VisionEncoder,
    language_model: LanguageModel,
    *,
    trained: frozenset[Module],
    ddp_config: DistributedDataParallelConfig,
    groups: Groups,
) -> Policy:
    """Freeze what is not trained and put the rest under Megatron's DDP.

    Args:
        encoder: the vision encoder.
        language_model: the language model.
        trained: modules that get gradients.
        ddp_config: Megatron's DDP options.
        groups: process groups.

    Returns:
        The policy. Gradients of both wrappers are plain sums over ranks: the loss weights already hold every mean.
    """
    encoder.requires_grad_(False)
    language_model.requires_grad_(False)
    for module in trained:
        for param in parameters_of(module, encoder, language_model):
            param.requires_grad_()
    return Policy(
        encoder=encoder,
        language_model=language_model,
        trained=trained,
        encoder_ddp=_ddp(encoder, ddp_config, groups.encoder) if trained - {"language_model"} else None,
        language_ddp=_language_ddp(language_model, ddp_config, groups) if "language_model" in trained else None,
    )


def _language_ddp(
    model: LanguageModel, ddp_config: DistributedDataParallelConfig, groups: Groups
) -> DistributedDataParallel:
    wrapped = _ddp(model, ddp_config, groups.language)

    def finalize(model: list[nn.Module], num_tokens: torch.Tensor | None = None, **kwargs: object) -> None:
        # Without a token count: mcore would divide by it, and our weights are global already.
        finalize_model_grads(model, None, **kwargs)

    model.config.finalize_model_grads_func = finalize
    if ddp_config.overlap_grad_reduce:
        model.config.no_sync_func = wrapped.no_sync
    return wrapped


def _ddp(
    module: VisionEncoder | LanguageModel, ddp_config: DistributedDataParallelConfig, groups: ProcessGroupCollection
) -> DistributedDataParallel:
    assert module.config.calculate_per_token_loss, "DDP would average gradients that are to be summed"
    wrapped = DistributedDataParallel(module.config, ddp_config, module, pg_collection=groups)
    wrapped.broadcast_params()
    return wrapped
