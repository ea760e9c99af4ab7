"""The phases every step is made of: encode tiles, run the language model over all packs, carry gradients back.

One step runs them in order over all packs of the step: encode, reference pass, policy pass, encoder backward. Visual
tokens enter the language model as leaf tensors, so that the two backward passes are separate.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_vico.data.samples import PackedStream
from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.models.language_model import LanguageInputs

LossFunction = Callable[[int, Tensor], Tensor]
"""From a pack's place in the step and its response rows [R, H] to its loss, a scalar."""


@dataclass(frozen=True, kw_only=True)
class VisualTokens:
    """The visual tokens of one pack, cut from the encoder's graph."""

    outputs_VH: Tensor
    """[V, H], what the encoder made; holds its graph where something in it is trained."""

    leaf_VH: Tensor
    """[V, H], what the language model sees; its gradient is the one of `outputs_VH`."""


def language_inputs(stream: PackedStream, device: torch.device) -> LanguageInputs:
    """A packed stream as the language model takes it, on the device it computes on."""
    return LanguageInputs(
        token_ids_T=stream.token_ids.to(device, non_blocking=True),
        visual_positions_V=stream.visual_positions.to(device, non_blocking=True),
        cu_seqlens=stream.cu_seqlens.to(device, non_blocking=True),
        max_seqlen=stream.max_seqlen,
        response_rows_R=stream.response_rows.to(device, non_blocking=True),
    )


def tile_features(encoder: VisionEncoder, tiles: Tensor, device: torch.device, *, trained: bool) -> Tensor:
    """ViT outputs of a pack's tiles.

    Args:
        encoder: the vision encoder.
        tiles: [N, 3, S, S] uint8, on the CPU.
        device: where to compute.
        trained: whether the ViT gets gradients; if not, nothing is kept for a backward pass.

    Returns:
        [N, P, D], patch features without the class token.
    """
    with torch.set_grad_enabled(trained):
        return encoder.features(encoder.normalise(tiles.to(device, non_blocking=True)))


def cut(outputs_VH: Tensor) -> VisualTokens:
    """Cut visual tokens from the encoder's graph; the leaf asks for a gradient even where the encoder is frozen."""
    return VisualTokens(outputs_VH=outputs_VH, leaf_VH=outputs_VH.detach().clone().requires_grad_())


def encoder_backward(tokens: Sequence[VisualTokens]) -> None:
    """Carry the gradients that the language model left on the leaves back through connectors and ViT."""
    pairs = [(each.outputs_VH, each.leaf_VH.grad) for each in tokens if each.outputs_VH.requires_grad]
    for outputs_VH, grad_VH in pairs:
        torch.autograd.backward(outputs_VH, grad_VH)


@torch.no_grad()
def forward_pass(
    model: torch.nn.Module,
    inputs: Sequence[LanguageInputs],
    visual_tokens: Sequence[Tensor],
    *,
    groups: ProcessGroupCollection,
) -> list[Tensor]:
    """A forward-only schedule over all packs of the step.

    Args:
        model: a frozen language model.
        inputs: one entry a pack.
        visual_tokens: [V, H] a pack.
        groups: the model's process groups.

    Returns:
        Response rows [R, H] a pack, in order, on the last pipeline stage; elsewhere an empty list.
    """

    def step(batches: Iterator[int], chunk: torch.nn.Module) -> tuple[Tensor, None]:
        index = next(batches)
        return chunk(inputs[index], visual_tokens[index]), None

    return _schedule(step, model, len(inputs), groups, forward_only=True)


def training_pass(
    model: torch.nn.Module,
    inputs: Sequence[LanguageInputs],
    visual_tokens: Sequence[VisualTokens],
    loss: LossFunction,
    *,
    groups: ProcessGroupCollection,
) -> Tensor:
    """Forward and backward over all packs of the step; gradients end in the model and on the leaves.

    Args:
        model: the policy's language model (wrapped in DDP where it is trained).
        inputs: one entry a pack.
        visual_tokens: one entry a pack.
        loss: loss of one pack, already weighted for the whole global batch: gradients are summed, never averaged.
        groups: the model's process groups.

    Returns:
        This rank's share of the loss, a float32 scalar.
    """

    def step(batches: Iterator[int], chunk: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        index = next(batches)

        def loss_function(rows_RH: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            value = loss(index, rows_RH)
            # Three values: mcore then divides by neither microbatches nor tokens (calculate_per_token_loss).
            return value, torch.zeros([], dtype=torch.int), {"loss": value.detach().clone()}

        return chunk(inputs[index], visual_tokens[index].leaf_VH), loss_function

    reduced = _schedule(step, model, len(inputs), groups, forward_only=False)
    return torch.stack([each["loss"] for each in reduced]).sum()


def _schedule(
    step: Callable[..., Any],
    model: torch.nn.Module,
    num_packs: int,
    groups: ProcessGroupCollection,
    *,
    forward_only: bool,
) -> list[Any]:
    run = get_forward_backward_func(pp_size=groups.pp.size(), vp_size=None)
    outputs: list[Any] = run(
        forward_step_func=step,
        data_iterator=iter(range(num_packs)),
        model=[model],
        num_microbatches=num_packs,
        seq_length=1,  # unused: lengths differ from pack to pack
        micro_batch_size=1,
        forward_only=forward_only,
        pg_collection=groups,
    )
    return outputs
