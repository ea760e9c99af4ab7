"""Figures over a validation set between two steps of training, which does not notice it.

The packs, their order and their compression plans are the same at every evaluation and for every
--seed, so that values compare over steps and runs. Each sample with an answer counts the same, once
or as often as its folder's repeat says (of a folder with 0.1, a tenth: the same one each time);
broken ones are named and left out, beside the run's budget. The packs that fill up the last global
batch come from the next epoch and weigh nothing, so that all ranks make the same number of passes
and no sample is left out.
"""

import dataclasses
import math
import time
from dataclasses import dataclass

import torch

from megatron_vico.config.schema import RunConfig
from megatron_vico.data.load.loader import Loader
from megatron_vico.data.samples import PackedBatch
from megatron_vico.errors import ConfigError
from megatron_vico.parallel.batch import StepBatch
from megatron_vico.training.data_state import build_loader
from megatron_vico.training.logger import log_skipped
from megatron_vico.training.metrics import ValidationFigures
from megatron_vico.training.setup import Run
from megatron_vico.training.steps import STEPS
from megatron_vico.training.stop import StopSignal

SEED = 0
"""Of the order of packs and of what is drawn for a sample."""


@dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """Global batches to evaluate."""

    loader: Loader | None
    """On the first rank of a replica. Its workers start with an evaluation and end with it:
    meanwhile those of training have filled their queues and rest, and between evaluations nothing
    competes with them."""

    num_packs: int
    """Packs of one pass over all of the set."""

    num_batches: int


def open_validation(run: Run) -> ValidationSet | None:
    """The validation set of a run, None if it has none; called by every rank.

    Of the set nothing but the index is read.

    Raises:
        ConfigError: if the shards do not fit the run, or --eval-iters asks for more than there is.
        SampleError: if a shard is broken or a sample is larger than a pack.
    """
    cfg, groups = run.cfg, run.groups
    if not cfg.data.valid_data_path:
        return None
    loader = (
        build_loader(_own_config(cfg), run.model, groups, views="validation")
        if groups.replica.rank() == 0
        else None
    )
    packs = torch.tensor(
        0 if loader is None else sum(1 for _ in loader.plan.epoch(0)), device=groups.device
    )
    torch.distributed.broadcast(packs, group=groups.replica, group_src=0)
    num_packs = int(packs)
    whole = -(-num_packs // cfg.training.global_batch_size)
    num_batches = cfg.training.eval_iters or whole
    if num_batches > whole:
        raise ConfigError(
            f"--eval-iters {num_batches}: the {num_packs} packs of --valid-data-path make {whole}"
            f" global batches of {cfg.training.global_batch_size}; use at most {whole}, or leave it"
            " out for all of them."
        )
    if loader is not None:
        loader.num_steps = num_batches
    return ValidationSet(loader=loader, num_packs=num_packs, num_batches=num_batches)


def _own_config(cfg: RunConfig) -> RunConfig:
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, data_path=cfg.data.valid_data_path),
        training=dataclasses.replace(cfg.training, seed=SEED),
    )


@torch.no_grad()
def validation_figures(
    run: Run, validation: ValidationSet, stop: StopSignal | None = None, *, iteration: int
) -> ValidationFigures | None:
    """The stage's figures over the validation set, the same on every rank, which all call it.

    None where `stop` told any rank to stop. Weights, gradients, optimizer, random state and router
    window are left as they are.

    Raises:
        SampleError: on every rank of a replica whose reader met a sample that cannot be read.
    """
    started = time.perf_counter()
    if validation.loader is not None:
        validation.loader.plan_state = validation.loader.plan.start
    # The head's weight is read outside its module's forward pass, which would wait.
    run.policy.finish_param_sync()
    run.policy.eval_mode()
    names, validate = run.cfg.stage.spec.figures, STEPS[run.cfg.stage.spec.loss].validate
    sums = torch.zeros(1 + len(names), dtype=torch.float64, device=run.groups.device)
    on_gpu = run.groups.device.type == "cuda"
    # Nothing draws in evaluation but torch's DataLoader, a seed for its workers.
    with torch.random.fork_rng(devices=[run.groups.device] if on_gpu else []):
        batches = run.spread(validation.loader, num_steps=validation.num_batches)
        if stop is not None:
            batches = stop.batches(batches, run.groups)
        for number, batch in enumerate(batches):
            if run.groups.replica.rank() == 0:
                log_skipped(batch.packs)
            left = validation.num_packs - number * run.cfg.training.global_batch_size
            counted = validate(run, _weighed(batch, num_packs=left))
            sums += torch.stack([value.to(sums.device, torch.float64) for value in counted])
    run.policy.train_mode()
    run.clock.drop_step()
    if stop is not None and stop.outcome != "ended":
        return None
    torch.distributed.all_reduce(sums)
    samples, *totals = sums.tolist()
    means = {
        name: total / samples if samples else math.nan
        for name, total in zip(names, totals, strict=True)
    }
    return ValidationFigures(
        iteration=iteration, samples=int(samples), time_s=time.perf_counter() - started, **means
    )


def _weighed(batch: StepBatch, *, num_packs: int) -> StepBatch:
    """A batch whose first `num_packs` packs count, with 1 for each sample that has an answer."""

    def weighed(pack: PackedBatch) -> PackedBatch:
        if pack.position >= num_packs:
            return dataclasses.replace(
                pack,
                kl_weight=torch.zeros_like(pack.kl_weight),
                router_tiles=pack.router_tiles[:0],
                router_tile_sample=pack.router_tile_sample[:0],
            )
        rows_D = torch.bincount(pack.sample_of_row, minlength=len(pack.keys))
        return dataclasses.replace(pack, kl_weight=1 / rows_D[pack.sample_of_row])

    return dataclasses.replace(batch, packs=tuple(weighed(pack) for pack in batch.packs))
