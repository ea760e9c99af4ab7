"""One step of router training (Eq. 2-4): three forward passes label the one tile that ViR is asked about."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vico.data.samples import PackedBatch
from megatron_vico.parallel.groups import Groups
from megatron_vico.training.metrics import RouterSums, StepSums, sums_of
from megatron_vico.training.passes import forward_pass, language_inputs, tile_features
from megatron_vico.training.policy import Policy
from megatron_vico.training.reference import Reference
from megatron_vico.vico.consistency import forward_kl
from megatron_vico.vico.router_targets import RatioWindow, labels_from_ratios, loss_ratio, sample_means
from megatron_vico.vico.routing import COMPRESS


def router_step(
    policy: Policy,
    reference: Reference,
    window: RatioWindow,
    packs: Sequence[PackedBatch],
    *,
    eps: float,
    groups: Groups,
) -> StepSums:
    """Gradients of ViR's cross-entropy over this rank's packs of one optimizer step.

    Args:
        policy: the model after consistency training; only its ViR is trained.
        reference: the model from before it, which never sees a compressed tile.
        window: past loss ratios, the same on every rank; this step's are added.
        packs: this rank's packs with two policy views each: nothing compressed, and one tile (or one image) of each
            sample compressed, named by `router_tiles`.
        eps: of Eq. 2, nats.
        groups: process groups.

    Returns:
        This rank's share of the loss and of the figures that are logged.
    """
    device = groups.device
    features = [tile_features(policy.encoder, pack.tiles, device, trained=False) for pack in packs]
    reference_tokens = [
        reference.visual_tokens(pack.tiles, each, device) for pack, each in zip(packs, features, strict=True)
    ]
    reference_inputs = [language_inputs(pack.reference, device) for pack in packs]
    reference_rows = reference.response_rows(reference_inputs, reference_tokens, groups=groups.language)
    rows_none, rows_one = (_policy_rows(policy, packs, features, view=view, groups=groups) for view in (0, 1))
    ratios = [
        _loss_ratios(policy, reference, pack, rows=(theirs, none, one), eps=eps)
        for pack, theirs, none, one in zip(packs, reference_rows, rows_none, rows_one, strict=True)
    ]
    # Every rank takes part, also one without a single image, and adds the same ratios in the same order.
    ratio_M = torch.cat(ratios)
    all_ratios, num_questions = _gather(ratio_M, groups)
    window.push(all_ratios)
    threshold = window.threshold().to(device)
    label_M = labels_from_ratios(ratio_M, threshold)
    logits_M2 = torch.cat([_ask(policy, pack, each) for pack, each in zip(packs, features, strict=True)])
    loss = F.cross_entropy(logits_M2.float(), label_M, reduction="sum") / max(num_questions, 1)
    if loss.requires_grad:
        loss.backward()
    router = RouterSums(
        questions=torch.tensor(float(len(label_M))),
        labelled_compress=(label_M == COMPRESS).sum().float(),
        predicted_compress=(logits_M2.argmax(dim=-1) == COMPRESS).sum().float(),
        correct=(logits_M2.argmax(dim=-1) == label_M).sum().float(),
        log_ratio=ratio_M.log().sum(),
        threshold=threshold / groups.dp_size,
    )
    return sums_of(packs, loss=loss.detach(), router=router)


def asked_samples(pack: PackedBatch) -> Tensor:
    """The pack's samples that the router is asked about, [M] int64, ascending; text-only samples are not."""
    return pack.router_tile_sample.unique_consecutive()


def _policy_rows(
    policy: Policy, packs: Sequence[PackedBatch], features: Sequence[Tensor], *, view: int, groups: Groups
) -> list[Tensor]:
    """The policy's response rows [R, H] under one of the two plans, a tensor a pack."""
    device = groups.device
    with torch.no_grad():
        tokens = [
            policy.encoder.visual_tokens(each, pack.policies[view].compressed.to(device))
            for pack, each in zip(packs, features, strict=True)
        ]
    inputs = [language_inputs(pack.policies[view].stream, device) for pack in packs]
    return forward_pass(policy.language_model, inputs, tokens, groups=groups.language)


@torch.no_grad()
def _loss_ratios(
    policy: Policy, reference: Reference, pack: PackedBatch, *, rows: tuple[Tensor, Tensor, Tensor], eps: float
) -> Tensor:
    """r of Eq. 2 for the pack's questions, [M]; rows: of the reference, and of the policy under both plans, [R, H].

    Logits live for one pack at a time: those of 4,096 rows take 2.5 GB.
    """
    reference_logits_RV = reference.language_model.response_logits(rows[0])
    asked_M = asked_samples(pack).to(rows[0].device)
    sample_of_row_R = pack.sample_of_row.to(rows[0].device)
    none_M, one_M = (
        sample_means(
            forward_kl(reference_logits_RV, policy.language_model.response_logits(rows_RH)),
            sample_of_row_R,
            len(pack.keys),
        )[asked_M]
        for rows_RH in rows[1:]
    )
    return loss_ratio(one_M, none_M, eps=eps)


def _ask(policy: Policy, pack: PackedBatch, features_NPD: Tensor) -> Tensor:
    """ViR's logits [M, 2] for the compressed tile (or image) of each sample."""
    tiles_M = torch.bincount(pack.router_tile_sample, minlength=len(pack.keys))
    counts = tiles_M[tiles_M > 0].tolist()  # on the CPU, where packs are made
    if not counts:
        return features_NPD.new_zeros(0, 2)
    asked_NPD = features_NPD[pack.router_tiles.to(features_NPD.device)]
    if max(counts) == 1:
        return policy.encoder.vir(asked_NPD)
    first = torch.tensor([0, *counts[:-1]]).cumsum(0).to(features_NPD.device)
    logits: Tensor = policy.encoder.vir(asked_NPD, counts)
    return logits[first]


def _gather(ratio_M: Tensor, groups: Groups) -> tuple[Tensor, int]:
    """The ratios of all data-parallel ranks in rank order, and how many there are."""
    if groups.dp_size == 1:
        return ratio_M, len(ratio_M)
    mine = torch.tensor([len(ratio_M)], device=ratio_M.device)
    counts = [torch.empty_like(mine) for _ in range(groups.dp_size)]
    torch.distributed.all_gather(counts, mine, group=groups.data_parallel)
    sizes = [int(count) for count in counts]
    padded = torch.zeros(max(sizes), device=ratio_M.device)
    padded[: len(ratio_M)] = ratio_M
    gathered = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(gathered, padded, group=groups.data_parallel)
    return torch.cat([each[:size] for each, size in zip(gathered, sizes, strict=True)]), sum(sizes)
