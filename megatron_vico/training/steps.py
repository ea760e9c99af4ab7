"""Which step trains with each loss, and which figures it has on a validation set.

The row of a stage in config/stages.py names its loss; a new loss is one line of `STEPS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vico.parallel.batch import StepBatch
from megatron_vico.training.compare_plans import compare_plans
from megatron_vico.training.consistency_step import consistency_step, pretrain_loss, pretrain_step
from megatron_vico.training.metrics import StepSums
from megatron_vico.training.router_step import router_loss, router_step
from megatron_vico.training.setup import Run


@dataclass(frozen=True, kw_only=True)
class LossSteps:
    """What is done with the packs of a step; both are called by every rank."""

    train: Callable[[Run, StepBatch], StepSums]
    """Gradients of one optimizer step, before they are reduced."""

    validate: Callable[[Run, StepBatch], list[Tensor]]
    """This rank's part of the number of samples and of the stage's `figures`, to be divided by
    it."""


def _pretrain_sums(run: Run, batch: StepBatch) -> list[Tensor]:
    loss = pretrain_loss(run, batch)
    counted = loss if run.groups.counts_loss else torch.zeros_like(loss)
    return [_num_samples(run, batch), counted]


def _consistency_sums(run: Run, batch: StepBatch) -> list[Tensor]:
    compared = compare_plans(run, batch, plans=("xi", "all"))
    samples, weight_R = _num_samples(run, batch), _weights(batch)
    if not run.groups.counts_loss or run.groups.language.cp.rank() != 0:
        return [samples, torch.zeros(()), torch.zeros(())]  # others have the same rows, or none
    return [samples, *((kl_R * weight_R.to(kl_R.device)).sum() for kl_R in compared.kl_R)]


def _router_sums(run: Run, batch: StepBatch) -> list[Tensor]:
    loss, sums = router_loss(run, batch)
    return [sums.questions, loss, sums.correct, sums.labelled_compress, sums.predicted_compress]


def _weights(batch: StepBatch) -> Tensor:
    return torch.cat([pack.kl_weight for pack in batch.packs])


def _num_samples(run: Run, batch: StepBatch) -> Tensor:
    """Samples that count, on the replica's first rank: the weights of each one's rows sum to 1."""
    weight_R = _weights(batch)
    if run.groups.replica.rank() != 0:
        return weight_R.new_zeros(())
    return weight_R.double().sum().round()


STEPS: Mapping[str, LossSteps] = {
    "cross_entropy": LossSteps(train=pretrain_step, validate=_pretrain_sums),
    "consistency": LossSteps(train=consistency_step, validate=_consistency_sums),
    "router": LossSteps(train=router_step, validate=_router_sums),
}
