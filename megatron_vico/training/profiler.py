"""--profile: torch.profiler over some steps of a run, and the names of a step's parts in its trace.

evaluation/plots.py draws the pipeline from these names.
"""

import contextlib
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import profile, record_function

from megatron_vico.config.schema import RunConfig


def phase(name: str) -> record_function:
    """Name a part of the step that is not about one pack."""
    return record_function(f"phase: {name}")


def name_backward(name: str, output: Tensor) -> None:
    """Name the backward pass that will begin at `output`, while the profiler runs.

    megatron-core may free the data of `output` in between; the hook belongs to its graph.
    """
    if not (torch.autograd._profiler_enabled() and torch.is_grad_enabled()):
        return

    def begin(grad: Tensor) -> None:
        span = record_function(name)
        span.__enter__()
        # The range ends with this call of autograd, which is one chunk's backward pass.
        torch.autograd.Variable._execution_engine.queue_callback(
            lambda: span.__exit__(None, None, None)
        )

    if output.requires_grad:
        output.register_hook(begin)


def trace_folder(save: str, step: int) -> Path:
    """Where the ranks' traces go; `step`, counted from 1, is the last one profiled."""
    return Path(save) / "trace" / f"step_{step:07d}"


def open_profiler(
    cfg: RunConfig, *, resume_at: int
) -> contextlib.AbstractContextManager[profile | None]:
    """The profiler of this rank, whose `step` follows each step of the run; None without one.

    Of the first `resume_at` steps, which are done, none is profiled.
    """
    options, rank = cfg.training, torch.distributed.get_rank()
    start = max(options.profile_step_start, resume_at)
    chosen = not options.profile_ranks or rank in options.profile_ranks
    if not (options.profile and chosen and start < options.profile_step_end):
        return contextlib.nullcontext()
    assert cfg.checkpoint.save is not None, "config/validate.py asks for it"
    file = trace_folder(cfg.checkpoint.save, options.profile_step_end) / f"rank_{rank:04d}.json"

    def write(profiler: profile) -> None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(file))
        except (OSError, RuntimeError) as error:
            print(f"warning: {file} cannot be written: {error}; the run goes on", flush=True)

    return profile(
        schedule=torch.profiler.schedule(
            wait=max(start - resume_at - 1, 0),
            warmup=1 if start > resume_at else 0,  # the first profiled step is slow to record
            active=options.profile_step_end - start,
            repeat=1,
        ),
        on_trace_ready=write,
        acc_events=True,
    )
