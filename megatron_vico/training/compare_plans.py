"""Reference and policy compared under several plans of the same packs, forward only.

Shapes: N tiles, P patches of a tile, D channels of the ViT, R response rows, H channels of the
language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vico.models.language_model import LanguageModel
from megatron_vico.parallel.batch import StepBatch
from megatron_vico.parallel.groups import Groups
from megatron_vico.parallel.streams import row_slice
from megatron_vico.training.pipeline_schedule import LanguagePass, forward_pass
from megatron_vico.training.setup import Run
from megatron_vico.training.vision import tile_features, visual_tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class ComparedPlans:
    """What the policy makes of each view of the packs, beside the reference."""

    features_NPD: Tensor
    """[N, P, D], the policy's ViT outputs of this rank's tiles."""

    reference_rows: Sequence[Tensor | None]
    """Hidden states [R, H] of the reference, a tensor a pack, on the last pipeline stage."""

    kl_R: tuple[Tensor, ...]
    """A tensor a plan: [R] float32, KL(reference || policy) of every response row of all packs, in
    pack order, on each rank of the last pipeline stage; elsewhere none."""


@torch.no_grad()
def compare_plans(run: Run, batch: StepBatch, *, plans: Sequence[str]) -> ComparedPlans:
    """Run the reference once and the policy once a plan, without gradients; called by every rank.

    The packs have a policy view for each plan; `plans` are their names in a profile.
    """
    policy, reference, groups = run.policy, run.reference, run.groups
    assert reference is not None
    reference.fetch()
    device, packs = groups.device, batch.packs
    reference_inputs = policy.inputs((pack.reference for pack in packs), groups)
    views = [[pack.policies[view] for pack in packs] for view in range(len(plans))]
    view_inputs = [policy.inputs(view, groups) for view in views]
    run.clock.begin("encode")
    features_NPD = tile_features(policy.encoder, batch, device, chunk_tiles=policy.chunk_tiles)
    reference_tokens = reference.visual_tokens(
        batch, features_NPD, inputs=reference_inputs, groups=groups
    )
    view_tokens = [
        visual_tokens(
            policy.encoder,
            batch,
            [each.compressed for each in view],
            inputs=inputs,
            features_NPD=features_NPD,
            chunk_tiles=policy.chunk_tiles,
            trained=False,
            groups=groups,
        )
        for view, inputs in zip(views, view_inputs, strict=True)
    ]
    run.clock.begin("reference")
    reference_rows = reference.response_rows(reference_inputs, reference_tokens, groups=groups)
    run.clock.begin("policy")
    policy_rows = [
        forward_pass(
            LanguagePass(
                name=f"policy ({plan})",
                chunks=policy.language_chunks,
                inputs=inputs,
                tokens=tokens,
                groups=groups.language,
            )
        )
        for plan, inputs, tokens in zip(plans, view_inputs, view_tokens, strict=True)
    ]
    kl_R: tuple[Tensor, ...] = ()
    if groups.is_last_stage:
        lens = [len(pack.labels) for pack in packs]
        kl_R = tuple(
            kl_of_packs(
                lens,
                reference=reference.head,
                reference_rows=reference_rows,
                policy=policy.head,
                policy_rows=rows,
                groups=groups,
            )
            for rows in policy_rows
        )
    return ComparedPlans(features_NPD=features_NPD, reference_rows=reference_rows, kl_R=kl_R)


@torch.no_grad()
def kl_of_packs(
    lens: Sequence[int],
    *,
    reference: LanguageModel,
    reference_rows: Sequence[Tensor | None],
    policy: LanguageModel,
    policy_rows: Sequence[Tensor | None],
    groups: Groups,
) -> Tensor:
    """KL(reference || policy) of every response row of all packs, [R] in pack order.

    Called by every rank of the last pipeline stage, with the chunks that have the heads; rows are
    [R, H] a pack, `lens` how many each pack has.
    """
    context = groups.language.cp
    kl_R = torch.zeros(sum(lens), device=groups.device)
    for pack_R, reference_RH, policy_RH in zip(
        kl_R.split(list(lens)), reference_rows, policy_rows, strict=True
    ):
        assert reference_RH is not None
        assert policy_RH is not None
        own = row_slice(len(pack_R), size=context.size(), rank=context.rank())
        pack_R[own] = policy.consistency_rows(
            policy_RH, reference=reference, reference_rows_RH=reference_RH
        )
    if context.size() > 1:
        # Each context rank has filled in its rows of every pack; the others are zero.
        torch.distributed.all_reduce(kl_R, group=context)
    return kl_R
