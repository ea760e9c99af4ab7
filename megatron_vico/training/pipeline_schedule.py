"""The middle phases of a step: the language model over all packs, forward only or with backward.

Both run megatron-core's schedules (1F1B, interleaved, or none without a pipeline) with lengths that
differ from pack to pack and are known beforehand. Nothing here synchronises ranks, so the first
stages begin with the next pass while the last ones still finish this one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from torch.profiler import record_function

from megatron_vico.models.language_model import LanguageInputs
from megatron_vico.parallel.static_shapes import StaticShapes
from megatron_vico.training.profiler import name_backward
from megatron_vico.training.vision import VisualTokens

LossFunction = Callable[[int, Tensor], Tensor]
"""From a pack's index in the step and its response rows [R, H] to its loss, a scalar."""


@dataclass(frozen=True, kw_only=True)
class LanguagePass:
    """What one run of a schedule works on."""

    name: str
    """In a profile: reference or policy, and in the router stage under which plan."""

    chunks: Sequence[nn.Module]
    """This rank's pipeline chunks, wrapped in DDP where they are trained."""

    inputs: Sequence[LanguageInputs]
    """One entry a pack."""

    tokens: VisualTokens
    groups: ProcessGroupCollection


@torch.no_grad()
def forward_pass(run: LanguagePass) -> list[Tensor]:
    """A forward-only schedule over all packs of the step.

    Returns:
        Response rows [R, H] a pack, in order, on the last pipeline stage; elsewhere an empty list.
    """

    def step(batches: Iterator[int], chunk: nn.Module) -> tuple[Tensor, None]:
        index = next(batches)
        return _forward(run, chunk, index), None

    return _schedule(step, run, forward_only=True)


def training_pass(run: LanguagePass, loss: LossFunction) -> Tensor:
    """Forward and backward over all packs; gradients end in the model and on the visual tokens.

    The loss of a pack is already weighted for the whole global batch: gradients are summed, never
    averaged.

    Returns:
        This rank's part of the loss, a float32 scalar; 0 on all but the last pipeline stage.
    """

    def step(batches: Iterator[int], chunk: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
        index = next(batches)

        def loss_function(rows_RH: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            with record_function(_name(run, "loss", index, chunk)):
                value = loss(index, rows_RH)
            # Three values: mcore then divides by neither microbatches nor tokens
            # (calculate_per_token_loss).
            return value, torch.zeros([], dtype=torch.int), {"loss": value.detach().clone()}

        return _forward(run, chunk, index), loss_function

    reduced = _schedule(step, run, forward_only=False)
    if not reduced:
        return torch.zeros((), device=run.inputs[0].token_ids_T.device)
    return torch.stack([each["loss"] for each in reduced]).sum()


def _forward(run: LanguagePass, chunk: nn.Module, index: int) -> Tensor:
    with record_function(_name(run, "forward", index, chunk)):
        output: Tensor = chunk(run.inputs[index], run.tokens.of(index))
    name_backward(_name(run, "backward", index, chunk), output)
    return output


def _name(run: LanguagePass, kind: str, index: int, chunk: nn.Module) -> str:
    """As evaluation/plots.py reads it."""
    return f"{run.name} {kind} pack {index} chunk {list(run.chunks).index(chunk)}"


def _schedule(step: Callable[..., Any], run: LanguagePass, *, forward_only: bool) -> list[Any]:
    num_packs, groups = len(run.inputs), run.groups
    # A rank with several chunks needs the interleaved schedule, which wants an iterator for each.
    interleaved = len(run.chunks) > 1
    schedule = get_forward_backward_func(
        pp_size=groups.pp.size(), vp_size=len(run.chunks) if interleaved else None
    )
    # Every rank knows all lengths, so that no shape is sent ahead of a tensor.
    shard_lens = [each.shard_len for each in run.inputs]
    communicator = (
        StaticShapes(groups.pp, run.chunks[0].config, shard_lens) if groups.pp.size() > 1 else None
    )
    outputs: list[Any] = schedule(
        forward_step_func=step,
        data_iterator=[iter(range(num_packs)) for _ in run.chunks]
        if interleaved
        else iter(range(num_packs)),
        model=list(run.chunks),
        num_microbatches=num_packs,
        seq_length=1,  # unused: lengths differ from pack to pack
        micro_batch_size=1,
        forward_only=forward_only,
        p2p_communicator=communicator,
        pg_collection=groups,
    )
    if communicator is not None:
        communicator.check_finished(forward_only=forward_only)
    return outputs
