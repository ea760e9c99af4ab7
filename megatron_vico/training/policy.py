"""The model that is trained: encoder and language model, what is frozen, and their DDP wrappers."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_vico.config.megatron_kwargs import megatron_kwargs
from megatron_vico.config.schema import RunConfig
from megatron_vico.config.stages import Module
from megatron_vico.data.samples import PackedStream
from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.models.language_model import LanguageInputs, LanguageModel
from megatron_vico.models.to_device import to_device
from megatron_vico.models.vir import is_dead
from megatron_vico.parallel.groups import Groups
from megatron_vico.parallel.streams import FP8_ALIGNMENT, StreamCut, language_inputs


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Encoder and language model of this rank; what is frozen as a whole has no DDP wrapper."""

    encoder: VisionEncoder
    language_chunks: tuple[LanguageModel, ...]
    """This rank's pipeline chunks, in the order of their layers."""

    trained: frozenset[Module]
    encoder_ddp: DistributedDataParallel | None
    language_ddp: tuple[DistributedDataParallel, ...]
    """One wrapper a chunk, or none."""

    stream_cut: StreamCut
    """How packed streams are padded and cut, for the reference too."""

    chunk_tiles: int
    """Tiles that go through the ViT at once."""

    @property
    def head(self) -> LanguageModel:
        """The chunk with the vocabulary head, on the last pipeline stage."""
        return self.language_chunks[-1]

    @property
    def schedule_chunks(self) -> Sequence[nn.Module]:
        """The language model as mcore's schedules take it."""
        return self.language_ddp or self.language_chunks

    @property
    def trains_encoder(self) -> bool:
        """Whether anything on the vision side gets gradients."""
        return self.encoder_ddp is not None

    @property
    def ddp_modules(self) -> list[DistributedDataParallel]:
        """What has gradients: language model first, then encoder."""
        return [*self.language_ddp, *([self.encoder_ddp] if self.encoder_ddp is not None else [])]

    def inputs(self, streams: Iterable[PackedStream], groups: Groups) -> list[LanguageInputs]:
        """This rank's parts of packed streams, of the reference's too, on its device."""
        return [language_inputs(each, self.stream_cut, groups.device) for each in streams]

    def zero_grad(self) -> None:
        """Zero the gradient buffers; the optimizer's own `zero_grad` must be called as well."""
        for module in self.ddp_modules:
            module.zero_grad_buffer()

    def finish_grad_sync(self) -> None:
        """Reduce the encoder's gradients; the schedule has reduced the language model's.

        Every rank comes here, also one without tiles.
        """
        if self.encoder_ddp is not None:
            self.encoder_ddp.finish_grad_sync()

    def finish_param_sync(self) -> None:
        """Wait for parameters being gathered; before anything but a training step reads weights."""
        for module in self.language_ddp:
            if module.ddp_config.overlap_param_gather:
                module.start_param_sync(force_sync=True)

    def train_mode(self) -> None:
        """Training behaviour (drop path) in what is trained, inference behaviour elsewhere.

        A language model that gradients pass through is in training mode even if it is frozen:
        megatron-core recomputes in no other mode, and would keep every activation. Nothing else
        differs in it: `config/validate.py` refuses what would (dropout, balancing and z loss).
        """
        self.encoder.eval()
        for chunk in self.language_chunks:
            chunk.train(any(name != "vir" for name in self.trained))
        for name in self.trained - {"language_model"}:
            getattr(self.encoder, name).train()

    def eval_mode(self) -> None:
        """Inference behaviour everywhere: no dropped path, no balancing loss."""
        self.encoder.eval()
        for chunk in self.language_chunks:
            chunk.eval()

    def weigh_balancing_loss(self, inputs: Sequence[LanguageInputs], groups: Groups) -> None:
        """Weigh a pack's expert-balancing loss by its part of the step's tokens.

        Called by every rank, before the passes.
        """
        # mcore multiplies it by the pack's tokens, expecting that all gradients are divided by the
        # step's tokens in the end; here losses come with their weight, and so must this one.
        config = self.head.config
        balances = (
            config.num_moe_experts is not None and config.moe_router_load_balancing_type != "none"
        )
        if not self.language_ddp or not balances:
            return
        ranks = self.stream_cut.context_size * self.stream_cut.sequence_size
        # One element, not a scalar: mcore copies it into what the reference's schedule has set,
        # which has this shape.
        count = float(sum(each.shard_len for each in inputs) * ranks)
        tokens = to_device(torch.tensor([count]), groups.device)
        torch.distributed.all_reduce(tokens, group=groups.data_parallel)
        scale = 1 / tokens
        config.moe_grad_scale_func = lambda: scale


def parameters_of(
    module: Module, encoder: VisionEncoder, language_chunks: Sequence[LanguageModel]
) -> Iterator[nn.Parameter]:
    """Parameters of one of the five modules, but ViR's dead ones."""
    owners: Sequence[nn.Module] = (
        language_chunks if module == "language_model" else [getattr(encoder, module)]
    )
    for owner in owners:
        for name, param in owner.named_parameters():
            # Frozen for good: with a gradient buffer of their own, weight decay would change them.
            if module != "vir" or not is_dead(name):
                yield param


def wrap(
    encoder: VisionEncoder,
    language_chunks: tuple[LanguageModel, ...],
    cfg: RunConfig,
    *,
    groups: Groups,
) -> Policy:
    """Freeze what the run does not train and put the rest under Megatron's DDP.

    Gradients of both wrappers are plain sums over ranks: the loss weights already hold every mean.
    """
    trained = frozenset(cfg.stage.trained)
    encoder.requires_grad_(False)
    for chunk in language_chunks:
        chunk.requires_grad_(False)
    for module in trained:
        for param in parameters_of(module, encoder, language_chunks):
            param.requires_grad_()
    if cfg.stage.freeze_moe_router:
        for chunk in language_chunks:
            for name, param in chunk.named_parameters():
                if ".mlp.router." in name:
                    param.requires_grad_(False)
    # --no-accumulate-allreduce-grads-in-fp32 takes the first field back.
    fields = {"grad_reduce_in_fp32": True} | megatron_kwargs(cfg, DistributedDataParallelConfig)
    ddp_config = DistributedDataParallelConfig(**fields)
    # The encoder's gradients arrive after the schedule, and on a rank without tiles not at all:
    # nothing to overlap.
    encoder_config = dataclasses.replace(
        ddp_config, overlap_grad_reduce=False, overlap_param_gather=False
    )
    fp8 = cfg.parallel.fp8_format is not None
    policy = Policy(
        encoder=encoder,
        language_chunks=language_chunks,
        trained=trained,
        encoder_ddp=(
            _ddp(encoder, encoder_config, groups.encoder) if trained - {"language_model"} else None
        ),
        language_ddp=(
            _language_ddp(language_chunks, ddp_config, groups)
            if "language_model" in trained
            else ()
        ),
        stream_cut=StreamCut.of(
            groups,
            sequence_parallel=cfg.parallel.sequence_parallel,
            alignment=FP8_ALIGNMENT[cfg.parallel.fp8_recipe] if fp8 else 1,
        ),
        chunk_tiles=cfg.model.encoder_chunk_tiles,
    )
    for name in cfg.stage.spec.unused:
        # Last: DDP has sent it round. It stays in checkpoints, and takes no memory of the device.
        getattr(encoder, name).cpu()
    return policy


def _language_ddp(
    chunks: Sequence[LanguageModel], ddp_config: DistributedDataParallelConfig, groups: Groups
) -> tuple[DistributedDataParallel, ...]:
    config = chunks[0].config
    # As Megatron does: the communication of later chunks overlaps with other chunks' work without
    # small buckets.
    wrapped = tuple(
        _ddp(chunk, ddp_config, groups.language, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    )

    def finalize(
        model: list[nn.Module], num_tokens: torch.Tensor | None = None, **kwargs: object
    ) -> None:
        # Without a token count: mcore would divide by it, and our weights are global already.
        finalize_model_grads(model, None, **kwargs)

    config.finalize_model_grads_func = finalize
    if ddp_config.overlap_grad_reduce:
        no_syncs = [each.no_sync for each in wrapped]
        config.no_sync_func = no_syncs if len(wrapped) > 1 else no_syncs[0]
    return wrapped


def _ddp(
    module: VisionEncoder | LanguageModel,
    ddp_config: DistributedDataParallelConfig,
    groups: ProcessGroupCollection,
    *,
    disable_bucketing: bool = False,
) -> DistributedDataParallel:
    assert module.config.calculate_per_token_loss, (
        "DDP would average gradients that are to be summed"
    )
    wrapped = DistributedDataParallel(
        module.config, ddp_config, module, disable_bucketing=disable_bucketing, pg_collection=groups
    )
    wrapped.broadcast_params()
    return wrapped
