"""`vico train`: resolve a run from recipe and flags, and print it, check it, or train it.

torch and megatron (seconds) are imported by a run and by `--check files` only.
"""

import argparse
import os
from collections.abc import Sequence

from megatron_vico.checkpoint.run_folder import resolve_model
from megatron_vico.config.flags import help_text, parse, to_yaml
from megatron_vico.config.layout import (
    data_parallel_size,
    launched_world_size,
    num_microbatches,
)
from megatron_vico.config.pipeline_split import virtual_stages
from megatron_vico.config.registry import ModelConfig
from megatron_vico.config.schema import RunConfig
from megatron_vico.config.validate import remarks, validate
from megatron_vico.errors import ConfigError
from megatron_vico.files import refuse_missing

_CUDA_SETTINGS = {
    # Kernels begin in the order of their launch: communication that is to overlap with a product
    # is not queued behind it.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # Packs differ in length in each step: blocks of fixed sizes would leave gaps.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
"""Set before torch is imported, unless the environment says otherwise."""

STOPPED = 75
"""Exit status of a run that a scheduler's signal ended before its last step, with a checkpoint:
start it again (sysexits.h calls it EX_TEMPFAIL). 0 would let a chain go on with half a model."""

INTERRUPTED = 130
"""Of one that its user ended (Ctrl-C), with a checkpoint too, but nobody is to start it again."""


def main(arguments: Sequence[str]) -> int:
    """Do what the command line asks for.

    Args:
        arguments: the words after `train`.

    Returns:
        0; STOPPED or INTERRUPTED where a signal ended the run.

    Raises:
        ConfigError: if the run cannot work.
    """
    own = _own_flags()
    given, rest = own.parse_known_args(arguments)
    if given.help:
        print(own.format_help())
        print(help_text())
        return 0
    cfg = parse(rest)
    world_size = given.world_size or launched_world_size()
    if given.print_config:
        print(to_yaml(cfg), end="")
    if given.check:
        model = resolve_model(cfg)
        validate(cfg, world_size, model=model)
        if given.check == "files":
            from megatron_vico.training.preflight import (
                check_contents,
                check_environment,
                check_files,
            )

            check_files(cfg)
            check_environment(cfg)
            check_contents(cfg)
        print(summary(cfg, model, world_size))
    if given.check or given.print_config:
        return 0
    if given.world_size is not None:
        raise ConfigError(
            "--world-size belongs to --check; a run takes its ranks from the launcher (torchrun)."
        )
    # Again in `train`: here before torch, in a second.
    refuse_missing("--tokenizer-model", cfg.data.tokenizer_model)
    refuse_missing("--pretrained-checkpoint", cfg.checkpoint.pretrained_checkpoint)
    refuse_missing("--reference-load", cfg.stage.reference_load)
    validate(cfg, world_size, model=resolve_model(cfg))
    for name, value in _CUDA_SETTINGS.items():
        os.environ.setdefault(name, value)
    from megatron_vico import cpu_stand_in

    cpu_stand_in.install()
    from megatron_vico.training.trainer import train

    return {"ended": 0, "stopped": STOPPED, "interrupted": INTERRUPTED}[train(cfg)]


def summary(cfg: RunConfig, model: ModelConfig, world_size: int) -> str:
    """What a checked run would do, in a few lines.

    Args:
        cfg: a run that `validate` accepts.
        model: its model.
        world_size: its ranks.

    Returns:
        Text for the terminal.
    """
    parallel, language = cfg.parallel, model.language
    chunks = virtual_stages(cfg, language)
    extras = [f"{chunks} chunks a stage"] if chunks is not None else []
    if language.num_experts is not None:
        width = parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
        extras.append(f"expert {parallel.expert_model_parallel_size} x expert tensor {width}")
    lines = [
        f"OK: stage {cfg.stage.stage} of {model.name} on {world_size} ranks: tensor"
        f" {parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size}"
        f" x context {parallel.context_parallel_size} x data"
        f" {data_parallel_size(parallel, world_size)}{''.join(f', {extra}' for extra in extras)};"
        f" {num_microbatches(cfg, world_size)} microbatches of up to {cfg.data.seq_length} tokens a"
        f" step, {cfg.training.train_iters} steps."
    ]
    lines += [f"note: {remark}" for remark in remarks(cfg, world_size)]
    return "\n".join(lines)


def _own_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vico train",
        usage=(
            "%(prog)s [--recipe RECIPE.yaml] [flags]    (under torchrun: python -m megatron_vico"
            " train ...)"
        ),
        description="Run one stage of training. What counts: default < recipe < command line.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show all flags, Megatron's too")
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved run as a recipe, and stop"
    )
    parser.add_argument(
        "--check",
        nargs="?",
        const="layout",
        choices=("layout", "files"),
        help="check the run without a GPU, and stop; `files` also asks for data, checkpoints, and"
        " megatron-core's own checks",
    )
    parser.add_argument("--world-size", type=int, help="ranks to check for; unset, the launcher's")
    return parser
