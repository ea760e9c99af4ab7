"""One step of router training (Eq. 2-4): three forward passes give the labels of ViR.

The last pipeline stage finds the loss ratios, every rank learns those of all replicas and finds the
same threshold, and the rank that encoded a tile asks ViR about it.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vico.data.samples import PackedBatch
from megatron_vico.models.to_device import to_device
from megatron_vico.parallel.batch import StepBatch
from megatron_vico.parallel.groups import Groups
from megatron_vico.training.compare_plans import ComparedPlans, compare_plans
from megatron_vico.training.metrics import RouterSums, StepSums, margin_counts, sums_of
from megatron_vico.training.policy import Policy
from megatron_vico.training.setup import Run
from megatron_vico.vico.router_targets import labels_from_ratios, loss_ratio, sample_means
from megatron_vico.vico.routing import COMPRESS


class RouterLoss(NamedTuple):
    """ViR's answers to the questions about one rank's tiles."""

    loss: Tensor
    """Cross-entropy, summed over questions, nats."""

    sums: RouterSums


def router_step(run: Run, batch: StepBatch) -> StepSums:
    """Gradients of ViR's cross-entropy over the packs of one optimizer step; called by every rank.

    Each pack has two policy views: nothing compressed, and one tile (or one image) of each sample
    compressed, named by `router_tiles`. The tiles of such an image are all on one rank. The step's
    loss ratios are added to the run's window, the same ones on every rank.
    """
    compared = compare_plans(run, batch, plans=("none", "one"))
    ratio_M = _loss_ratios(run, compared, batch.packs)
    run.clock.begin("router")
    # Every rank takes part, also one without a single image, and adds the same ratios in the same
    # order.
    all_ratios = _gather(ratio_M, batch.packs, run.groups)
    run.window.push(all_ratios)
    loss, router = _router_loss(run, batch, compared.features_NPD, ratio_M)
    loss = loss / max(len(all_ratios), 1)
    if loss.requires_grad:
        loss.backward()
    return sums_of(batch.packs, groups=run.groups, loss=loss, router=router)


@torch.no_grad()
def router_loss(run: Run, batch: StepBatch) -> RouterLoss:
    """This rank's part of the loss over packs that the router is not trained on; all ranks call it.

    The window of past ratios gives the threshold and is left as it is.
    """
    compared = compare_plans(run, batch, plans=("none", "one"))
    ratio_M = _loss_ratios(run, compared, batch.packs)
    return _router_loss(run, batch, compared.features_NPD, ratio_M)


@torch.no_grad()
def _loss_ratios(run: Run, compared: ComparedPlans, packs: Sequence[PackedBatch]) -> Tensor:
    """r of Eq. 2 for all questions of the replica's packs, [M], on every rank of the replica."""
    groups = run.groups
    ratio_M = torch.zeros(sum(len(_asked_samples(pack)) for pack in packs), device=groups.device)
    if groups.is_last_stage:
        none_M, one_M = (_asked_means(packs, each, groups) for each in compared.kl_R)
        ratio_M = loss_ratio(one_M, none_M, eps=run.cfg.stage.router_eps)
    # From one rank to all of the replica, so that no two differ in a last digit: labels and
    # threshold depend on it.
    last = groups.replica.size() - groups.language.tp.size() * groups.language.cp.size()
    torch.distributed.broadcast(ratio_M, group=groups.replica, group_src=last)
    return ratio_M


def _asked_means(packs: Sequence[PackedBatch], kl_R: Tensor, groups: Groups) -> Tensor:
    """L_ViCO of each sample that the router is asked about, [M] in pack order."""
    means = []
    for pack, pack_R in zip(packs, kl_R.split([len(pack.labels) for pack in packs]), strict=True):
        sample_of_row_R = to_device(pack.sample_of_row, groups.device)
        asked_M = to_device(_asked_samples(pack), groups.device)
        means.append(sample_means(pack_R, sample_of_row_R, len(pack.keys))[asked_M])
    return torch.cat(means)


def _asked_samples(pack: PackedBatch) -> Tensor:
    """A pack's samples that the router is asked about, [M] int64, ascending; text-only are not."""
    return pack.router_tile_sample.unique_consecutive()


def _router_loss(run: Run, batch: StepBatch, features_NPD: Tensor, ratio_M: Tensor) -> RouterLoss:
    """Ask about this rank's tiles; `ratio_M` is of all questions of the replica."""
    window_4 = torch.stack([run.window.threshold(), *run.window.percentiles(10, 50, 90)])
    window_4 = to_device(window_4, ratio_M.device)
    threshold = window_4[0]  # tau of Eq. 3
    own_M, logits_M2 = _ask(run.policy, batch, features_NPD)
    ratio_M = ratio_M[to_device(own_M, ratio_M.device)]
    label_M = labels_from_ratios(ratio_M, threshold)
    predicted_M = logits_M2.argmax(dim=-1)
    sums = RouterSums(
        questions=torch.tensor(float(len(label_M))),
        labelled_compress=(label_M == COMPRESS).sum().float(),
        predicted_compress=(predicted_M == COMPRESS).sum().float(),
        correct=(predicted_M == label_M).sum().float(),
        log_ratio=ratio_M.log().sum(),
        margins=margin_counts(logits_M2[:, COMPRESS] - logits_M2[:, 1 - COMPRESS], label_M),
        window=window_4 / torch.distributed.get_world_size(),
    )
    return RouterLoss(F.cross_entropy(logits_M2.float(), label_M, reduction="sum"), sums)


def _ask(policy: Policy, batch: StepBatch, features_NPD: Tensor) -> tuple[Tensor, Tensor]:
    """ViR's logits for the questions about this rank's tiles.

    Returns:
        Which questions of the replica they are, [M'] int64 on the CPU; and the logits [M', 2].
    """
    counts_M = torch.cat(
        [pack.router_tile_sample.unique_consecutive(return_counts=True)[1] for pack in batch.packs]
    )
    first_tiles = accumulate((pack.num_tiles for pack in batch.packs[:-1]), initial=0)
    tiles = torch.cat(
        [pack.router_tiles + first for pack, first in zip(batch.packs, first_tiles, strict=True)]
    )
    question = torch.arange(len(counts_M)).repeat_interleave(counts_M)
    own = (tiles >= batch.split.own.start) & (tiles < batch.split.own.stop)
    own_M = question[own].unique_consecutive()
    if not len(own_M):
        return own_M, features_NPD.new_zeros(0, 2)
    asked_NPD = features_NPD[to_device(tiles[own] - batch.split.own.start, features_NPD.device)]
    counts = counts_M[own_M].tolist()  # on the CPU, where packs are made
    assert sum(counts) == len(asked_NPD), "the tiles of a question are on one rank"
    if max(counts) == 1:
        return own_M, policy.encoder.vir(asked_NPD)
    first = to_device(torch.tensor([0, *counts[:-1]]).cumsum(0), features_NPD.device)
    logits: Tensor = policy.encoder.vir(asked_NPD, counts)
    return own_M, logits[first]


def _gather(ratio_M: Tensor, packs: Sequence[PackedBatch], groups: Groups) -> Tensor:
    """The ratios of all replicas, in the order of the step's samples."""
    # A window that is full then drops the same ones for every number of data-parallel ranks.
    if groups.dp_size == 1:
        return ratio_M
    places = [_asked_samples(pack) + float(pack.first_sample) for pack in packs]  # exact to 2^24
    placed_M2 = torch.stack([ratio_M, to_device(torch.cat(places), ratio_M.device)], dim=1)
    count = to_device(torch.tensor([len(placed_M2)]), ratio_M.device)
    counts = [torch.empty_like(count) for _ in range(groups.dp_size)]
    torch.distributed.all_gather(counts, count, group=groups.data_parallel)
    sizes = [int(each) for each in counts]
    padded = placed_M2.new_zeros(max(sizes), 2)
    padded[: len(placed_M2)] = placed_M2
    gathered = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(gathered, padded, group=groups.data_parallel)
    ratios, order = torch.cat(
        [each[:size] for each, size in zip(gathered, sizes, strict=True)]
    ).unbind(dim=1)
    return ratios[order.argsort(stable=True)]
