"""One step of consistency training or its warm-up (Eq. 1), in four phases; and of pretraining.

No barrier, collective over all ranks or `.item()` stands between the reference pass and the policy
pass.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vico.models.language_model import LanguageInputs
from megatron_vico.models.to_device import to_device
from megatron_vico.parallel.batch import StepBatch
from megatron_vico.parallel.groups import Groups
from megatron_vico.parallel.streams import row_slice
from megatron_vico.training.metrics import SHARES, StepSums, one_hot_shares, sums_of
from megatron_vico.training.pipeline_schedule import (
    LanguagePass,
    LossFunction,
    forward_pass,
    training_pass,
)
from megatron_vico.training.policy import Policy
from megatron_vico.training.setup import Run
from megatron_vico.training.vision import VisualTokens, tile_features, visual_tokens


def consistency_step(run: Run, batch: StepBatch) -> StepSums:
    """Gradients of Eq. 1 over the packs of one optimizer step; called by every rank.

    Each pack has one policy view, whose plan has a share xi ~ U[0, 1] of each image's tiles
    compressed. Nothing is synchronised.
    """
    policy, reference, groups = run.policy, run.reference, run.groups
    assert reference is not None
    reference.fetch()
    device, packs = groups.device, batch.packs
    # All that goes to the device goes before the passes: nothing between them waits for it.
    reference_inputs = policy.inputs((pack.reference for pack in packs), groups)
    policy_inputs = policy.inputs((pack.policies[0] for pack in packs), groups)
    weights = _row_weights(batch, groups)
    share_weights = [
        to_device(_own_rows(pack.kl_weight[:, None] * one_hot_shares(pack), groups), device)
        for pack in packs
    ]
    kl_by_share = torch.zeros(len(SHARES), device=device)
    policy.weigh_balancing_loss(policy_inputs, groups)

    run.clock.begin("encode")
    features_NPD = _frozen_features(policy, batch, groups)
    reference_tokens = reference.visual_tokens(
        batch, features_NPD, inputs=reference_inputs, groups=groups
    )
    tokens = visual_tokens(
        policy.encoder,
        batch,
        [pack.policies[0].compressed for pack in packs],
        inputs=policy_inputs,
        features_NPD=features_NPD,
        chunk_tiles=policy.chunk_tiles,
        trained=policy.trains_encoder,
        groups=groups,
    )

    run.clock.begin("reference")
    reference_rows = reference.response_rows(reference_inputs, reference_tokens, groups=groups)
    del reference_tokens, reference_inputs

    def loss(index: int, policy_RH: Tensor) -> Tensor:
        reference_RH, reference_rows[index] = reference_rows[index], None  # freed pack by pack
        assert reference_RH is not None
        return policy.head.consistency_loss(
            policy_RH,
            weights[index],
            reference=reference.head,
            reference_rows_RH=reference_RH,
            observe=lambda kl_R: kl_by_share.add_(kl_R.float() @ share_weights[index]),
        )

    total = _train(run, loss, inputs=policy_inputs, tokens=tokens)
    return sums_of(packs, groups=groups, loss=total, kl_by_share=kl_by_share)


def pretrain_step(run: Run, batch: StepBatch) -> StepSums:
    """Gradients of next-token cross-entropy, for a model to start from; called by every rank.

    Each sample counts the same, as in Eq. 1: the mean over its response tokens, then over samples.
    """
    policy, groups = run.policy, run.groups
    inputs = policy.inputs((pack.reference for pack in batch.packs), groups)
    loss = _label_loss(policy, batch, groups)
    policy.weigh_balancing_loss(inputs, groups)
    run.clock.begin("encode")
    tokens = _whole_tokens(
        policy, batch, inputs=inputs, trained=policy.trains_encoder, groups=groups
    )
    total = _train(run, loss, inputs=inputs, tokens=tokens)
    return sums_of(batch.packs, groups=groups, loss=total)


@torch.no_grad()
def pretrain_loss(run: Run, batch: StepBatch) -> Tensor:
    """The loss of `pretrain_step` alone; called by every rank.

    Returns:
        This rank's part of it; tensor-parallel ranks have the same, of which one counts.
    """
    policy, groups = run.policy, run.groups
    loss = _label_loss(policy, batch, groups)
    inputs = policy.inputs((pack.reference for pack in batch.packs), groups)
    language_pass = LanguagePass(
        name="policy",
        chunks=policy.language_chunks,
        inputs=inputs,
        tokens=_whole_tokens(policy, batch, inputs=inputs, trained=False, groups=groups),
        groups=groups.language,
    )
    values = [loss(index, rows_RH) for index, rows_RH in enumerate(forward_pass(language_pass))]
    return torch.stack(values).sum() if values else torch.zeros((), device=groups.device)


def _whole_tokens(
    policy: Policy,
    batch: StepBatch,
    *,
    inputs: Sequence[LanguageInputs],
    trained: bool,
    groups: Groups,
) -> VisualTokens:
    """The policy's visual tokens with nothing compressed."""
    return visual_tokens(
        policy.encoder,
        batch,
        [pack.reference.compressed for pack in batch.packs],
        inputs=inputs,
        features_NPD=_frozen_features(policy, batch, groups),
        chunk_tiles=policy.chunk_tiles,
        trained=trained,
        groups=groups,
    )


def _frozen_features(policy: Policy, batch: StepBatch, groups: Groups) -> Tensor | None:
    """Outputs of a frozen ViT, [N, P, D], made once; a trained one runs again for its gradients."""
    if "vit" in policy.trained:
        return None
    return tile_features(policy.encoder, batch, groups.device, chunk_tiles=policy.chunk_tiles)


def _label_loss(policy: Policy, batch: StepBatch, groups: Groups) -> LossFunction:
    """Cross-entropy of a pack's response tokens."""
    weights = _row_weights(batch, groups)
    labels = [to_device(_own_rows(pack.labels, groups), groups.device) for pack in batch.packs]

    def loss(index: int, rows_RH: Tensor) -> Tensor:
        return policy.head.cross_entropy(rows_RH, labels[index], weights[index])

    return loss


def _train(
    run: Run, loss: LossFunction, *, inputs: Sequence[LanguageInputs], tokens: VisualTokens
) -> Tensor:
    """Policy pass and encoder backward; this rank's part of the loss."""
    language_pass = LanguagePass(
        name="policy",
        chunks=run.policy.schedule_chunks,
        inputs=inputs,
        tokens=tokens,
        groups=run.groups.language,
    )
    run.clock.begin("policy")
    total = training_pass(language_pass, loss)
    if run.policy.trains_encoder:
        run.clock.begin("encoder_backward")
        tokens.backward()
    run.clock.begin("other")
    return total


def _row_weights(batch: StepBatch, groups: Groups) -> list[Tensor]:
    """Weights of the response rows that this context-parallel rank works on, a tensor a pack."""
    return [to_device(_own_rows(pack.kl_weight, groups), groups.device) for pack in batch.packs]


def _own_rows(values_R: Tensor, groups: Groups) -> Tensor:
    context = groups.language.cp
    return values_R[row_slice(len(values_R), size=context.size(), rank=context.rank())]
