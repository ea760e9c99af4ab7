"""One step of consistency training or its warm-up (Eq. 1), in four phases; and the pretraining step, its simpler kin.

No barrier, collective over all ranks or `.item()` stands between the reference pass and the policy pass.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vico.data.samples import PackedBatch
from megatron_vico.parallel.groups import Groups
from megatron_vico.training.metrics import StepSums, sums_of
from megatron_vico.training.passes import (
    VisualTokens,
    cut,
    encoder_backward,
    language_inputs,
    tile_features,
    training_pass,
)
from megatron_vico.training.policy import Policy
from megatron_vico.training.reference import Reference
from megatron_vico.vico.consistency import forward_kl, weighted_sum


def consistency_step(policy: Policy, reference: Reference, packs: Sequence[PackedBatch], *, groups: Groups) -> StepSums:
    """Gradients of Eq. 1 over this rank's packs of one optimizer step.

    Args:
        policy: the model that is trained; its gradients are zero when this is called.
        reference: the frozen model.
        packs: this rank's packs, each with one policy view whose plan has a share xi ~ U[0, 1] of each image's tiles
            compressed.
        groups: process groups.

    Returns:
        This rank's share of the loss and of the figures that are logged; nothing is synchronised.
    """
    device = groups.device
    policy_tokens: list[VisualTokens] = []
    reference_tokens: list[Tensor] = []
    for pack in packs:
        features_NPD = tile_features(policy.encoder, pack.tiles, device, trained="vit" in policy.trained)
        reference_tokens.append(reference.visual_tokens(pack.tiles, features_NPD, device))
        compressed_N = pack.policies[0].compressed.to(device)
        policy_tokens.append(cut(policy.encoder.visual_tokens(features_NPD, compressed_N)))

    reference_inputs = [language_inputs(pack.reference, device) for pack in packs]
    reference_rows = reference.response_rows(reference_inputs, reference_tokens, groups=groups.language)
    del reference_tokens

    def loss(index: int, rows_RH: Tensor) -> Tensor:
        with torch.no_grad():
            reference_logits_RV = reference.language_model.response_logits(reference_rows[index])
        policy_logits_RV = policy.language_model.response_logits(rows_RH)
        return weighted_sum(forward_kl(reference_logits_RV, policy_logits_RV), packs[index].kl_weight.to(device))

    policy_inputs = [language_inputs(pack.policies[0].stream, device) for pack in packs]
    total = training_pass(policy.schedule_model, policy_inputs, policy_tokens, loss, groups=groups.language)
    encoder_backward(policy_tokens)
    return sums_of(packs, loss=total)


def pretrain_step(policy: Policy, packs: Sequence[PackedBatch], *, groups: Groups) -> StepSums:
    """Gradients of next-token cross-entropy over this rank's packs: how a model is made that ViCO can start from.

    Each sample counts the same, as in Eq. 1: the mean over its response tokens, then over samples.

    Args:
        policy: the model that is trained; its gradients are zero when this is called.
        packs: this rank's packs, without policy views; nothing is compressed.
        groups: process groups.

    Returns:
        As `consistency_step`.
    """
    device = groups.device
    tokens: list[VisualTokens] = []
    for pack in packs:
        features_NPD = tile_features(policy.encoder, pack.tiles, device, trained="vit" in policy.trained)
        tokens.append(cut(policy.encoder.visual_tokens(features_NPD, None)))

    def loss(index: int, rows_RH: Tensor) -> Tensor:
        logits_RV = policy.language_model.response_logits(rows_RH)
        losses_R = F.cross_entropy(logits_RV, packs[index].labels.to(device), reduction="none")
        return weighted_sum(losses_R, packs[index].kl_weight.to(device))

    inputs = [language_inputs(pack.reference, device) for pack in packs]
    total = training_pass(policy.schedule_model, inputs, tokens, loss, groups=groups.language)
    encoder_backward(tokens)
    return sums_of(packs, loss=total)
