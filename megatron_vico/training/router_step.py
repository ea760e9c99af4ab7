"""One step of router training (Eq. 2-4): three forward passes label the one tile that ViR is asked about.

The last pipeline stage finds the loss ratios, every rank learns those of all replicas and finds the same threshold, and
the rank that encoded a tile asks ViR about it.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vico.data.samples import PackedBatch
from megatron_vico.models.language_model import LanguageInputs
from megatron_vico.parallel.batch import StepBatch
from megatron_vico.parallel.groups import Groups
from megatron_vico.parallel.streams import language_inputs, row_share
from megatron_vico.training.metrics import RouterSums, StepSums, sums_of
from megatron_vico.training.passes import LanguagePass, forward_pass
from megatron_vico.training.policy import Policy
from megatron_vico.training.reference import Reference
from megatron_vico.training.trace import StepTrace
from megatron_vico.training.vision import VisualTokens, tile_features, visual_tokens
from megatron_vico.vico.router_targets import RatioWindow, labels_from_ratios, loss_ratio, sample_means
from megatron_vico.vico.routing import COMPRESS


def router_step(
    policy: Policy,
    reference: Reference,
    window: RatioWindow,
    batch: StepBatch,
    *,
    eps: float,
    groups: Groups,
    trace: StepTrace | None = None,
) -> StepSums:
    """Gradients of ViR's cross-entropy over the packs of one optimizer step; called by every rank.

    Args:
        policy: the model after consistency training; only its ViR is trained.
        reference: the model from before it, which never sees a compressed tile.
        window: past loss ratios, the same on every rank; this step's are added.
        batch: this replica's packs with two policy views each: nothing compressed, and one tile (or one image) of each
            sample compressed, named by `router_tiles`. The tiles of such an image are all on one rank.
        eps: of Eq. 2, nats.
        groups: process groups.
        trace: records who does what when.

    Returns:
        This rank's share of the loss and of the figures that are logged.
    """
    device, packs = groups.device, batch.packs
    reference_inputs = [language_inputs(pack.reference, policy.stream_cut, device) for pack in packs]
    views = [[pack.policies[view] for pack in packs] for view in (0, 1)]
    view_inputs = [[language_inputs(each.stream, policy.stream_cut, device) for each in view] for view in views]
    features_NPD = tile_features(policy.encoder, batch, device, chunk_tiles=policy.chunk_tiles, trace=trace)
    reference_tokens = reference.visual_tokens(batch, features_NPD, groups, trace=trace)
    view_tokens = [
        visual_tokens(
            policy.encoder,
            features_NPD,
            batch,
            [each.compressed for each in view],
            trained=False,
            groups=groups,
            trace=trace,
        )
        for view in views
    ]
    reference_rows = reference.response_rows(reference_inputs, reference_tokens, groups=groups, trace=trace)
    rows_none, rows_one = (
        _policy_rows(policy, inputs, tokens, name=f"policy ({plan})", groups=groups, trace=trace)
        for plan, inputs, tokens in zip(("none", "one"), view_inputs, view_tokens, strict=True)
    )
    rows = (reference_rows, rows_none, rows_one)
    ratio_M = _loss_ratios(policy, reference, packs, rows=rows, eps=eps, groups=groups)
    # Every rank takes part, also one without a single image, and adds the same ratios in the same order.
    all_ratios = _gather(ratio_M, packs, groups)
    window.push(all_ratios)
    threshold = window.threshold().to(device)
    mine_M, logits_M2 = _ask(policy, batch, features_NPD)
    ratio_M = ratio_M[mine_M.to(device)]
    label_M = labels_from_ratios(ratio_M, threshold)
    loss = F.cross_entropy(logits_M2.float(), label_M, reduction="sum") / max(len(all_ratios), 1)
    if loss.requires_grad:
        loss.backward()
    predicted_M = logits_M2.argmax(dim=-1)
    router = RouterSums(
        questions=torch.tensor(float(len(label_M))),
        labelled_compress=(label_M == COMPRESS).sum().float(),
        predicted_compress=(predicted_M == COMPRESS).sum().float(),
        correct=(predicted_M == label_M).sum().float(),
        log_ratio=ratio_M.log().sum(),
        threshold=threshold / torch.distributed.get_world_size(),
    )
    return sums_of(packs, groups=groups, loss=loss, router=router)


def _policy_rows(
    policy: Policy,
    inputs: Sequence[LanguageInputs],
    tokens: VisualTokens,
    *,
    name: str,
    groups: Groups,
    trace: StepTrace | None,
) -> list[Tensor]:
    """The policy's response rows [R, H] under one of the two plans, a tensor a pack, on the last stage."""
    return forward_pass(
        LanguagePass(
            name=name,
            chunks=policy.language_chunks,
            inputs=inputs,
            tokens=tokens,
            groups=groups.language,
            trace=trace,
        )
    )


@torch.no_grad()
def _loss_ratios(
    policy: Policy,
    reference: Reference,
    packs: Sequence[PackedBatch],
    *,
    rows: tuple[Sequence[Tensor | None], Sequence[Tensor], Sequence[Tensor]],
    eps: float,
    groups: Groups,
) -> Tensor:
    """r of Eq. 2 for all questions of the replica's packs, [M], on every rank of the replica.

    Args: rows: of the reference, and of the policy under both plans, [R, H] a pack, on the last pipeline stage.
    """
    ratio_M = torch.zeros(sum(len(_asked_samples(pack)) for pack in packs), device=groups.device)
    if groups.is_last_stage:
        values = [_kl_of_packs(policy, reference, packs, rows=(rows[0], each), groups=groups) for each in rows[1:]]
        none_M, one_M = (_asked_means(packs, each, groups) for each in values)
        ratio_M = loss_ratio(one_M, none_M, eps=eps)
    # From one rank to all of the replica, so that no two differ in a last digit: labels and threshold depend on it.
    last = groups.replica.size() - groups.language.tp.size() * groups.language.cp.size()
    torch.distributed.broadcast(ratio_M, group=groups.replica, group_src=last)
    return ratio_M


def _kl_of_packs(
    policy: Policy,
    reference: Reference,
    packs: Sequence[PackedBatch],
    *,
    rows: tuple[Sequence[Tensor | None], Sequence[Tensor]],
    groups: Groups,
) -> Tensor:
    """KL of every response row of all packs, [R] in pack order, put together over context-parallel ranks."""
    context = groups.language.cp
    lens = [len(pack.labels) for pack in packs]
    kl_R = torch.zeros(sum(lens), device=groups.device)
    for of_pack, theirs_RH, mine_RH in zip(kl_R.split(lens), *rows, strict=True):
        assert theirs_RH is not None
        share = row_share(len(of_pack), size=context.size(), rank=context.rank())
        of_pack[share] = policy.head.consistency_rows(mine_RH, reference=reference.head, reference_rows_RH=theirs_RH)
    if context.size() > 1:
        torch.distributed.all_reduce(kl_R, group=context)
    return kl_R


def _asked_means(packs: Sequence[PackedBatch], kl_R: Tensor, groups: Groups) -> Tensor:
    """L_ViCO of each sample that the router is asked about, [M] in pack order."""
    means = []
    for pack, of_pack in zip(packs, kl_R.split([len(pack.labels) for pack in packs]), strict=True):
        sample_of_row_R = pack.sample_of_row.to(groups.device)
        asked_M = _asked_samples(pack).to(groups.device)
        means.append(sample_means(of_pack, sample_of_row_R, len(pack.keys))[asked_M])
    return torch.cat(means)


def _asked_samples(pack: PackedBatch) -> Tensor:
    """The pack's samples that the router is asked about, [M] int64, ascending; text-only samples are not."""
    return pack.router_tile_sample.unique_consecutive()


def _ask(policy: Policy, batch: StepBatch, features_NPD: Tensor) -> tuple[Tensor, Tensor]:
    """ViR's logits for the questions about this rank's tiles.

    Returns:
        Which questions of the replica they are, [M'] int64 on the CPU; and the logits [M', 2].
    """
    counts_M = torch.cat([pack.router_tile_sample.unique_consecutive(return_counts=True)[1] for pack in batch.packs])
    first_tiles = accumulate((pack.num_tiles for pack in batch.packs[:-1]), initial=0)
    tiles = torch.cat([pack.router_tiles + first for pack, first in zip(batch.packs, first_tiles, strict=True)])
    question = torch.arange(len(counts_M)).repeat_interleave(counts_M)
    mine = (tiles >= batch.share.mine.start) & (tiles < batch.share.mine.stop)
    mine_M = question[mine].unique_consecutive()
    if not len(mine_M):
        return mine_M, features_NPD.new_zeros(0, 2)
    asked_NPD = features_NPD[(tiles[mine] - batch.share.mine.start).to(features_NPD.device)]
    counts = counts_M[mine_M].tolist()  # on the CPU, where packs are made
    assert sum(counts) == len(asked_NPD), "the tiles of a question are on one rank"
    if max(counts) == 1:
        return mine_M, policy.encoder.vir(asked_NPD)
    first = torch.tensor([0, *counts[:-1]]).cumsum(0).to(features_NPD.device)
    logits: Tensor = policy.encoder.vir(asked_NPD, counts)
    return mine_M, logits[first]


def _gather(ratio_M: Tensor, packs: Sequence[PackedBatch], groups: Groups) -> Tensor:
    """The ratios of all replicas in the order of the step's packs: a window that is full drops the same ones for every
    number of data-parallel ranks."""
    if groups.dp_size == 1:
        return ratio_M
    positions = [torch.full((len(_asked_samples(pack)),), float(pack.position)) for pack in packs]
    mine = torch.stack([ratio_M, torch.cat(positions).to(ratio_M.device)], dim=1)
    count = torch.tensor([len(mine)], device=ratio_M.device)
    counts = [torch.empty_like(count) for _ in range(groups.dp_size)]
    torch.distributed.all_gather(counts, count, group=groups.data_parallel)
    sizes = [int(each) for each in counts]
    padded = mine.new_zeros(max(sizes), 2)
    padded[: len(mine)] = mine
    gathered = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(gathered, padded, group=groups.data_parallel)
    ratios, order = torch.cat([each[:size] for each, size in zip(gathered, sizes, strict=True)]).unbind(dim=1)
    return ratios[order.argsort(stable=True)]
