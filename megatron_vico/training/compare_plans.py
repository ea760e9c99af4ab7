"""Reference and policy compared under several plans of the same packs, forward only: for router
labels and validation.

Shapes: N tiles, P patches of a tile, D channels of the ViT, R response rows, H channels of the
language model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vico.data.samples import PackedBatch
from megatron_vico.parallel.batch import StepBatch
from megatron_vico.parallel.groups import Groups
from megatron_vico.parallel.streams import language_inputs, row_share
from megatron_vico.training.pipeline_schedule import LanguagePass, forward_pass
from megatron_vico.training.policy import Policy
from megatron_vico.training.reference import Reference
from megatron_vico.training.vision import tile_features, visual_tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class ComparedViews:
    """What the policy makes of each view of the packs, beside the reference."""

    features_NPD: Tensor
    """[N, P, D], the policy's ViT outputs of this rank's tiles."""

    kl_R: tuple[Tensor, ...]
    """A tensor a view: [R] float32, KL(reference || policy) of every response row of all packs, in
    pack order, on each rank of the last pipeline stage; elsewhere none."""


@torch.no_grad()
def compare_views(
    policy: Policy,
    reference: Reference,
    batch: StepBatch,
    *,
    plans: Sequence[str],
    groups: Groups,
) -> ComparedViews:
    """Run the reference once and the policy once a view, without gradients; called by every rank.

    Args:
        policy: the model.
        reference: the frozen model.
        batch: this replica's packs with `len(plans)` policy views each.
        plans: what each view is called in traces.
        groups: process groups.

    Returns:
        Features and KL.
    """
    device, packs = groups.device, batch.packs
    reference_inputs = [
        language_inputs(pack.reference, policy.stream_cut, device) for pack in packs
    ]
    views = [[pack.policies[view] for pack in packs] for view in range(len(plans))]
    view_inputs = [
        [language_inputs(each.stream, policy.stream_cut, device) for each in view] for view in views
    ]
    features_NPD = tile_features(policy.encoder, batch, device, chunk_tiles=policy.chunk_tiles)
    reference_tokens = reference.visual_tokens(batch, features_NPD, groups)
    view_tokens = [
        visual_tokens(
            policy.encoder,
            features_NPD,
            batch,
            [each.compressed for each in view],
            trained=False,
            groups=groups,
        )
        for view in views
    ]
    reference_rows = reference.response_rows(reference_inputs, reference_tokens, groups=groups)
    passes = [
        LanguagePass(
            name=f"policy ({plan})",
            chunks=policy.language_chunks,
            inputs=inputs,
            tokens=tokens,
            groups=groups.language,
        )
        for plan, inputs, tokens in zip(plans, view_inputs, view_tokens, strict=True)
    ]
    rows = [forward_pass(each) for each in passes]
    if not groups.is_last_stage:
        return ComparedViews(features_NPD=features_NPD, kl_R=())
    kl_R = tuple(
        _kl_of_packs(policy, reference, packs, rows=(reference_rows, each), groups=groups)
        for each in rows
    )
    return ComparedViews(features_NPD=features_NPD, kl_R=kl_R)


def _kl_of_packs(
    policy: Policy,
    reference: Reference,
    packs: Sequence[PackedBatch],
    *,
    rows: tuple[Sequence[Tensor | None], Sequence[Tensor]],
    groups: Groups,
) -> Tensor:
    """KL of every response row of all packs, [R] in pack order, put together over context-parallel
    ranks.

    Args: rows: of the reference and of the policy, [R, H] a pack.
    """
    context = groups.language.cp
    lens = [len(pack.labels) for pack in packs]
    kl_R = torch.zeros(sum(lens), device=groups.device)
    for of_pack, theirs_RH, mine_RH in zip(kl_R.split(lens), *rows, strict=True):
        assert theirs_RH is not None
        share = row_share(len(of_pack), size=context.size(), rank=context.rank())
        of_pack[share] = policy.head.consistency_rows(
            mine_RH, reference=reference.head, reference_rows_RH=theirs_RH
        )
    if context.size() > 1:
        torch.distributed.all_reduce(kl_R, group=context)
    return kl_R
