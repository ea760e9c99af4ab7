"""THE loop: packs in, one optimizer step after another, log lines and checkpoints out."""

import dataclasses
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from megatron_vico.checkpoint import training_checkpoint
from megatron_vico.checkpoint.ownership import owned
from megatron_vico.checkpoint.retention import remove_superseded
from megatron_vico.checkpoint.run_folder import iteration_folder, metadata_of, resolve_model
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
from megatron_vico.errors import ReadingStopped
from megatron_vico.parallel import groups as process_groups
from megatron_vico.parallel.batch import StepBatch
from megatron_vico.training.bad_steps import refuse_learning_nothing
from megatron_vico.training.data_state import refuse_useless_data
from megatron_vico.training.flops import step_flops
from megatron_vico.training.fp8_reference import check_fp8_reference
from megatron_vico.training.going_on import after_bad_step
from megatron_vico.training.logger import MetricsLogger, log_skipped
from megatron_vico.training.metrics import Measured, StepFigures, StepSums
from megatron_vico.training.preflight import check_contents, check_environment, check_files
from megatron_vico.training.profiler import open_profiler, phase
from megatron_vico.training.read_ahead import ReadAhead
from megatron_vico.training.rescue import Progress, saved_on_error
from megatron_vico.training.setup import Run, set_up
from megatron_vico.training.steps import STEPS
from megatron_vico.training.stop import Outcome, StopSignal
from megatron_vico.training.validation import (
    ValidationSet,
    open_validation,
    validation_figures,
)


@worker_death_explained()
def train(cfg: RunConfig) -> Outcome:
    """Run one stage from its configuration to its last checkpoint.

    Returns:
        How it ended; where a signal ended it, its checkpoint is of the last step that was begun.

    Raises:
        ConfigError: before any process group exists, if the configuration cannot work.
        SampleError: if more samples are broken than --max-skipped-share, or shards are not what was
            indexed.
        WorkerError: if a worker process of the loader dies or gives nothing.
        CheckpointError: if a checkpoint cannot be read or written; the last good one still loads.
        TrainingError: if a step is bad (--on-bad-step), or nothing is learned.
    """
    stop = StopSignal()  # first: a signal while the weights are loaded must not be lost
    validate(cfg, launched_world_size(), model=resolve_model(cfg))
    check_files(cfg)
    check_environment(cfg)
    if os.environ.get("RANK", "0") == "0":  # it reads: not all ranks at once
        check_contents(cfg)
    with (
        process_groups.started(
            cfg.parallel,
            seed=cfg.training.seed,
            timeout_minutes=cfg.training.distributed_timeout_minutes,
        ) as groups,
        owned(cfg.checkpoint.save),
    ):

        def end_if_told() -> None:
            if stop.agreed(groups) != "ended":
                raise ReadingStopped

        try:
            end_if_told()
            run = set_up(cfg, groups, between=end_if_told)
            refuse_useless_data(cfg, run.data)
            end_if_told()
            return _loop(run, stop)
        except ReadingStopped:
            if groups.is_main:
                print("told to stop before the first step: nothing is new to save", flush=True)
            return stop.agreed(groups)


def _loop(run: Run, stop: StopSignal) -> Outcome:
    cfg, groups = run.cfg, run.groups
    logger = MetricsLogger(
        cfg, resume_at=run.iteration, budget=run.data.budget, is_main=groups.is_main
    )
    _announce(run, logger)
    if run.reference is not None and cfg.parallel.fp8_format is not None:
        logger.note(check_fp8_reference(run))
    validation = open_validation(run)
    for loader in (run.data.loader, None if validation is None else validation.loader):
        if loader is not None:
            loader.should_stop = stop.is_received
    run.policy.train_mode()
    run.optimizer.watch = run.watch
    iteration, progress = run.iteration, Progress.of(run)
    save, batches = partial(_save, progress), ReadAhead(run.batches(), run.data)
    with open_profiler(cfg, resume_at=iteration) as profiler, saved_on_error(progress, save):
        started = time.perf_counter()
        while True:
            place = run.data.place()
            batch = stop.next_batch(batches, groups)
            if batch is None:
                run.data.go_back(place)
                break
            iteration += 1
            last = iteration == cfg.training.train_iters
            leaves = last or _due(iteration, cfg.training.exit_interval)
            saves = leaves or _due(iteration, cfg.training.save_interval)
            figures = _step(
                progress,
                batch,
                iteration=iteration,
                started=started,
                queued=(lambda: None) if saves else batches.fetch,
            )
            started = time.perf_counter()
            is_bad = run.watch.problem is not None
            if is_bad:
                back = after_bad_step(progress, batch, logger, iteration=iteration)
                if back is not None:
                    iteration, batches = back, ReadAhead(run.batches(back), run.data)
            progress.step_done(iteration)
            if run.data.loader is not None:
                log_skipped(batch.packs)
            if not is_bad:
                logger.log(figures)
            run.data.count(figures)
            if is_bad:
                continue
            if profiler is not None:
                profiler.step()
                started = time.perf_counter()  # the writing of a trace is no part of a step
            if saves:
                save()
                run.watch.rollbacks = 0
                started = time.perf_counter()
            refuse_learning_nothing(run.watch, steps=iteration - run.iteration, last=last)
            # After the checkpoint, which a broken validation set must not cost.
            if validation is not None and (last or _due(iteration, cfg.training.eval_interval)):
                _validate(run, validation, stop, logger, iteration=iteration)
                started = time.perf_counter()
            if leaves:
                break
        if iteration > progress.tried:
            save()
    logger.close()
    return stop.outcome if iteration < cfg.training.train_iters else "ended"


def _step(
    progress: Progress,
    batch: StepBatch,
    *,
    iteration: int,
    started: float,
    queued: Callable[[], None],
) -> StepFigures:
    """One optimizer step, or what would have been one: `run.watch` says whether it was taken.

    `queued` is called when the device has all to do that gives the gradients.
    """
    run = progress.run
    # Dropped paths depend on seed, step and rank alone: a resumed run drops the same ones.
    steps_done, rank = iteration - 1, torch.distributed.get_rank()
    torch.manual_seed(run.cfg.training.seed + 1_000_003 * steps_done + rank)
    sums = compute_gradients(run, batch)
    queued()
    run.watch.begin(sums)
    learning_rate = run.scheduler.get_lr({})  # that of --lr; modules may have a multiple
    run.clock.begin("optimizer")
    progress.is_sound = False
    with phase("optimizer"):
        grad_norm = update_weights(run)
    return StepFigures.reduce(
        sums,
        measured(run, batch),
        iteration=iteration,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        step_time_s=time.perf_counter() - started,
    )


def _validate(
    run: Run, validation: ValidationSet, stop: StopSignal, logger: MetricsLogger, *, iteration: int
) -> None:
    figures = validation_figures(run, validation, stop, iteration=iteration)
    if figures is None:
        logger.note(f"told to stop: validation at step {iteration} is left out")
    else:
        logger.log(figures)


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
        _keep_tokenizer(run, Path(cfg.checkpoint.save) / TOKENIZER_FOLDER)


def _keep_tokenizer(run: Run, target: Path) -> None:
    """Put the tokenizer, and what came with the weights the run begins with, beside its results."""
    files, given = run.cfg.checkpoint, run.cfg.data.tokenizer_model
    assert given is not None
    tokenizer = load_tokenizer(given)
    source = files.load if run.iteration else files.pretrained_checkpoint
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
        iteration_folder(files.save, iteration),
        modules=run.modules,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        trainer_state={
            "iteration": iteration,
            "router_window": run.window.state(),
            "data": run.data.to_state(),
            "recent_steps": run.watch.state(),
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
