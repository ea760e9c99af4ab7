"""THE loop: packs in, one optimizer step after another, log lines and checkpoints out."""

import dataclasses
import signal
import time
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Literal

import torch

from megatron_vico.checkpoint import training_checkpoint
from megatron_vico.checkpoint.ownership import owned
from megatron_vico.checkpoint.retention import remove_superseded
from megatron_vico.checkpoint.run_folder import has_checkpoint, metadata_of, resolve_model
from megatron_vico.config.flags import to_yaml
from megatron_vico.config.gpus import peak_tflops
from megatron_vico.config.layout import launched_world_size
from megatron_vico.config.schema import RunConfig
from megatron_vico.config.stages import MODULES
from megatron_vico.config.validate import validate
from megatron_vico.convert.huggingface.export import carry_companions
from megatron_vico.convert.open import TOKENIZER_FOLDER
from megatron_vico.data.encode.tokenizer import load_tokenizer
from megatron_vico.data.load.loader import worker_death_explained
from megatron_vico.parallel import groups as process_groups
from megatron_vico.parallel.batch import StepBatch
from megatron_vico.training.flops import step_flops
from megatron_vico.training.logger import MetricsLogger, log_skipped
from megatron_vico.training.metrics import Measured, StepFigures, StepSums, check_finite
from megatron_vico.training.preflight import check_environment, check_files
from megatron_vico.training.profiler import open_profiler, phase
from megatron_vico.training.rescue import Progress, saved_on_error
from megatron_vico.training.setup import Run, set_up
from megatron_vico.training.steps import STEPS
from megatron_vico.training.validation import open_validation, validation_figures


@worker_death_explained()
def train(cfg: RunConfig) -> Literal["ended", "stopped"]:
    """Run one stage from its configuration to its last checkpoint.

    Returns:
        "stopped" where a signal ended it before its last step; the checkpoint is of that step.

    Raises:
        ConfigError: before any process group exists, if the configuration cannot work.
        SampleError: if more samples are broken than --max-skipped-share, or shards are not what was
            indexed.
        WorkerError: if a worker process of the loader dies.
        CheckpointError: if a checkpoint cannot be read or written; the last good one still loads.
    """
    stop = _StopSignal()  # first: a signal while the weights are loaded must not be lost
    validate(cfg, launched_world_size(), model=resolve_model(cfg))
    check_files(cfg)
    check_environment(cfg)
    with (
        process_groups.started(
            cfg.parallel,
            seed=cfg.training.seed,
            timeout_minutes=cfg.training.distributed_timeout_minutes,
        ) as groups,
        owned(cfg.checkpoint.save),
    ):
        return _loop(set_up(cfg, groups), stop)


def _loop(run: Run, stop: "_StopSignal") -> Literal["ended", "stopped"]:
    cfg, groups = run.cfg, run.groups
    logger = MetricsLogger(
        cfg, resume_at=run.iteration, budget=run.data.budget, is_main=groups.is_main
    )
    _announce(run, logger)
    validation = open_validation(run)
    run.policy.train_mode()
    iteration, stopped = run.iteration, False
    progress = Progress.of(run)
    save = partial(_save, progress)
    with open_profiler(cfg, resume_at=iteration) as profiler, saved_on_error(progress, save):
        started = time.perf_counter()
        for batch in run.batches():
            # Dropped paths depend on seed, step and rank alone: a resumed run drops the same ones.
            rank = torch.distributed.get_rank()
            torch.manual_seed(cfg.training.seed + 1_000_003 * iteration + rank)
            iteration += 1
            sums = compute_gradients(run, batch)
            learning_rate = run.scheduler.get_lr({})  # that of --lr; modules may have a multiple
            run.clock.begin("optimizer")
            progress.is_sound = False
            with phase("optimizer"):
                grad_norm = update_weights(run)
            now = time.perf_counter()
            figures = StepFigures.reduce(
                sums,
                measured(run, batch),
                iteration=iteration,
                grad_norm=grad_norm,
                learning_rate=learning_rate,
                step_time_s=now - started,
            )
            started = now
            check_finite(figures)
            progress.step_done(iteration)
            if run.data.loader is not None:
                log_skipped(batch.packs)
            logger.log(figures)
            run.data.count(figures)
            if profiler is not None:
                profiler.step()
                started = time.perf_counter()  # the writing of a trace is no part of a step
            last = iteration == cfg.training.train_iters
            stopped = stop.agreed(groups) and not last
            ending = stopped or last or _due(iteration, cfg.training.exit_interval)
            if ending or _due(iteration, cfg.training.save_interval):
                save()
                started = time.perf_counter()
            # After the checkpoint, which a broken validation set must not cost.
            if validation is not None and (last or _due(iteration, cfg.training.eval_interval)):
                logger.log(validation_figures(run, validation, iteration=iteration))
                started = time.perf_counter()
            if ending:
                break
    logger.close()
    return "stopped" if stopped else "ended"


def _announce(run: Run, logger: MetricsLogger) -> None:
    """Say what is about to run."""
    cfg, trained = run.cfg, run.policy.trained
    # Of the whole model, however it is split.
    counts = dataclasses.asdict(run.model.parameter_counts())
    described = ", ".join(f"{name} {counts[name]:,}" for name in MODULES if name in trained)
    logger.note(
        f"stage {cfg.stage.stage} of {run.model.name}: {cfg.training.train_iters} steps from step"
        f" {run.iteration}, {cfg.training.global_batch_size} packs a step on {run.groups.dp_size}"
        f" data-parallel ranks; trained parameters: {described}; frozen:"
        f" {sum(counts.values()) - sum(counts[name] for name in trained):,}"
    )
    if cfg.training.profile and cfg.training.profile_step_end <= run.iteration:
        logger.note(
            f"--profile-step-end {cfg.training.profile_step_end} is past: nothing will be recorded"
        )
    if run.groups.is_main and cfg.checkpoint.save is not None:
        _keep_tokenizer(cfg, Path(cfg.checkpoint.save) / TOKENIZER_FOLDER)


def _keep_tokenizer(cfg: RunConfig, target: Path) -> None:
    """Put the tokenizer, and what came with the weights the run begins with, beside its results."""
    assert cfg.data.tokenizer_model is not None
    tokenizer = load_tokenizer(cfg.data.tokenizer_model)
    files = cfg.checkpoint
    resumed = files.load if files.load is not None and has_checkpoint(files.load) else None
    source = resumed or files.pretrained_checkpoint
    if source is None or Path(source, TOKENIZER_FOLDER) == target:
        target.mkdir(exist_ok=True)
        tokenizer.save_to(target)
    else:
        carry_companions(Path(source, TOKENIZER_FOLDER), target, tokenizer=tokenizer)


def compute_gradients(run: Run, batch: StepBatch) -> StepSums:
    """Gradients of one step, reduced over ranks; called by every rank."""
    run.policy.zero_grad()
    # Not the same: mcore's fp32 optimizer leaves param.grad aliased to the buffer just zeroed.
    run.optimizer.zero_grad()
    sums = STEPS[run.cfg.stage.spec.loss].train(run, batch)
    run.policy.finish_grad_sync()
    return sums


def measured(run: Run, batch: StepBatch) -> Measured:
    """What this rank has to say of a step that is over; waits for nothing."""
    packs = batch.packs if run.groups.replica.rank() == 0 else ()
    on_gpu = run.groups.device.type == "cuda"
    return Measured(
        flops=sum(step_flops(run.model, run.cfg.stage, pack) for pack in packs),
        room_tokens=len(packs) * run.cfg.data.seq_length,
        memory_bytes=(
            (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
            if on_gpu
            else (0.0, 0.0)
        ),
        phases_s=run.clock.end_step(),
        peak_tflops=run.cfg.training.gpu_peak_tflops
        or (peak_tflops(torch.cuda.get_device_name()) if on_gpu else None),
    )


def update_weights(run: Run) -> float:
    """One optimizer step; called by every rank. Returns the gradient norm before clipping."""
    _, grad_norm, _ = run.optimizer.step()
    run.scheduler.step(increment=1)
    return float(grad_norm or 0.0)


def _due(iteration: int, interval: int | None) -> bool:
    return bool(interval and iteration % interval == 0)


def _save(progress: Progress) -> None:
    """Save a checkpoint of the last whole step; called by every rank."""
    run, iteration = progress.run, progress.iteration
    files = run.cfg.checkpoint
    if files.save is None or run.cfg.training.save_interval == 0:
        return
    progress.tried = iteration
    run.policy.finish_param_sync()
    progress.saved = training_checkpoint.save_checkpoint(
        files.save,
        iteration,
        modules=run.modules,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        trainer_state={
            "iteration": iteration,
            "router_window": run.window.state(),
            "data": run.data.to_state(),
        },
        config_yaml=to_yaml(run.cfg),
        metadata=metadata_of(run.model, stage=run.cfg.stage.stage, trained=run.trained_so_far),
        earlier=progress.saved,
    )
    if run.groups.is_main:
        try:
            remove_superseded(
                files.save,
                newest=iteration,
                keep_last=files.keep_last,
                keep_every=files.keep_every,
            )
        except OSError as error:
            print(f"warning: superseded checkpoints cannot be removed: {error}", flush=True)


class _StopSignal:
    """SIGTERM (a scheduler taking the machines back) ends the run with a checkpoint."""

    def __init__(self) -> None:
        self._received = False
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def agreed(self, groups: process_groups.Groups) -> bool:
        """Whether any rank was told to stop; all ask, and so stop after the same step."""
        flag = torch.tensor(float(self._received), device=groups.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag)
