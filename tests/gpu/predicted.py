"""`python -m tests.gpu.predicted LAYERS FLAG ...`: bytes that a step takes at most, by the dry run.

In a process of its own, which sees no GPU: what the dry run puts in the place of one stays.
"""

import sys

from megatron_vico import cpu_stand_in

if __name__ == "__main__":
    # The dry run has its own stand-ins for it, and it may not load where no GPU is seen.
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    cpu_stand_in.install("meta")

import dataclasses
from collections.abc import Sequence

from benchmarks.runs import stage_config
from megatron_vico.config.flags import parse
from megatron_vico.config.registry import ModelConfig, get_model_config
from megatron_vico.config.schema import RunConfig
from megatron_vico.planning.dry_run import dry_run


def run_of(num_layers: int, flags: Sequence[str]) -> tuple[RunConfig, ModelConfig]:
    """A run of one pack a step, its ViT frozen, and its model with so many layers (0: all)."""
    cfg = parse(["--global-batch-size", "1", "--train-iters", "4", *flags])
    model = get_model_config(cfg.model.model_size)
    if num_layers:
        language = dataclasses.replace(model.language, num_layers=num_layers)
        model = dataclasses.replace(model, language=language)
    return stage_config(cfg, cfg.stage.stage), model


if __name__ == "__main__":
    found = dry_run(*run_of(int(sys.argv[1]), sys.argv[2:]), world_size=1, rank=0, num_packs=(1, 1))
    print(max(found.steps[1].peak.values()))
