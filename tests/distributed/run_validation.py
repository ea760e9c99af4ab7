"""Evaluates cases under their layouts, and trains around an evaluation; started by torchrun from
the tests.

Usage: run_validation.py FOLDER, with FOLDER/cases.pkl, a pickled dict of RunConfig by name. Writes
FOLDER/found.json.
"""

import dataclasses
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

from megatron_vico import cpu_stand_in

cpu_stand_in.install()

import torch  # noqa: E402

from megatron_vico.config.schema import RunConfig  # noqa: E402
from megatron_vico.parallel.groups import Groups  # noqa: E402
from megatron_vico.training.setup import set_up  # noqa: E402
from megatron_vico.training.trainer import compute_gradients, update_weights  # noqa: E402
from megatron_vico.training.validation import open_validation, validation_figures  # noqa: E402
from tests.distributed.cached_layouts import CachedLayouts  # noqa: E402


def figures_of(cfg: RunConfig, groups: Groups) -> dict[str, Any]:
    """What a run finds over its validation set before its first step; called by every rank."""
    run = set_up(cfg, groups)
    run.window.push(torch.linspace(0.8, 1.6, 9))
    validation = open_validation(run)
    assert validation is not None
    figures = dataclasses.asdict(validation_figures(run, validation, iteration=0))
    return {
        name: value for name, value in figures.items() if name != "time_s" and value is not None
    }


def trained(cfg: RunConfig, groups: Groups, *, evaluated: bool) -> dict[str, list[float]]:
    """Gradient norm of each step, and its loss on the validation set if that is asked for; called
    by every rank."""
    run = set_up(cfg, groups)
    validation = open_validation(run)
    assert validation is not None
    run.policy.train_mode()
    norms, losses = [], []
    for number, batch in enumerate(run.batches()):
        compute_gradients(run, batch)
        norms.append(update_weights(run))
        if evaluated:
            losses.append(validation_figures(run, validation, iteration=number).loss)
    return {"norms": norms, "losses": losses}


def main() -> None:
    """Run the cases with one set of process groups a layout."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    cases: dict[str, RunConfig] = pickle.loads((folder / "cases.pkl").read_bytes())
    layouts = CachedLayouts()
    found: dict[str, Any] = {}
    for name, cfg in cases.items():
        groups = layouts.switch_to(cfg.parallel)
        found[name] = {"figures": figures_of(cfg, groups)}
        if name.endswith("trained"):
            found[name]["without"] = trained(cfg, groups, evaluated=False)
            found[name]["with"] = trained(cfg, groups, evaluated=True)
    everyones: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyones, found)
    if torch.distributed.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(everyones))
    torch.distributed.barrier()
    os._exit(0)  # many process groups take long to close


if __name__ == "__main__":
    main()
