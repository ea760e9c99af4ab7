"""How a run goes on after a step that was found to be bad: --on-bad-step."""

from pathlib import Path

from megatron_vico.checkpoint import training_checkpoint
from megatron_vico.checkpoint.run_folder import has_checkpoint
from megatron_vico.errors import TrainingError
from megatron_vico.parallel.batch import StepBatch
from megatron_vico.training.bad_steps import keys_of, note_bad_step, refuse_hopeless, told
from megatron_vico.training.logger import MetricsLogger
from megatron_vico.training.rescue import Progress


def after_bad_step(
    progress: Progress, batch: StepBatch, logger: MetricsLogger, *, iteration: int
) -> int | None:
    """Do what --on-bad-step says of the step `iteration`; called by every rank.

    Returns:
        The step that the run goes back to; None where it goes on.

    Raises:
        TrainingError: if it ends here.
    """
    run = progress.run
    watch, save, action = run.watch, run.cfg.checkpoint.save, run.cfg.training.on_bad_step
    assert watch.problem is not None
    keys = keys_of(batch, reads=run.groups.replica.rank() == 0)
    clause = told(iteration, watch.problem, keys, save=save)
    if run.groups.is_main and save is not None:
        note_bad_step(
            Path(save), iteration=iteration, problem=watch.problem, action=action, keys=keys
        )
    if action == "stop":
        # Nothing of the step is left, and what is there may be saved.
        run.scheduler.step(increment=-1)
        progress.is_sound = True
        raise TrainingError(
            f"{clause}. The weights were not changed and the last checkpoint is untouched: look at"
            " these samples, lower --lr, or go on with --on-bad-step skip or rollback."
        )
    refuse_hopeless(watch)
    if action == "skip":
        logger.note(f"{clause}: its update is left out")
        return None
    assert save is not None, "config/validate.py asks for it"
    if not has_checkpoint(save):
        raise TrainingError(f"{clause}. There is no checkpoint in {save} to roll back to.")
    run.scheduler.num_steps = 0  # megatron-core adds the checkpoint's steps to those done
    restored = training_checkpoint.load_checkpoint(
        save,
        modules=run.modules,
        optimizer=run.optimizer,
        scheduler=run.scheduler,
        model_size=run.model.name,
    )
    run.window.load(restored["router_window"])
    watch.rewind(restored.get("recent_steps", []))
    watch.rollbacks += 1
    logger.note(
        f"{clause}: back to the checkpoint of step {restored['iteration']}; the data of the steps"
        " since then is left out"
    )
    back = int(restored["iteration"])
    logger.rewind(back)
    progress.tried = back
    return back
