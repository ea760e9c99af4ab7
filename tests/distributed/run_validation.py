"""Evaluates cases under their layouts, and trains around an evaluation."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from megatron_vico.config.schema import RunConfig
from megatron_vico.parallel.groups import Groups
from megatron_vico.training.setup import set_up
from megatron_vico.training.trainer import compute_gradients, update_weights
from megatron_vico.training.validation import open_validation, validation_figures
from tests.distributed.cached_layouts import CachedLayouts


def found_of(
    cfg: RunConfig, groups: Groups, *, evaluated: bool = True, is_trained: bool = False
) -> dict[str, Any]:
    """What a run finds over its validation set before its first step, and the gradient norm of each
    step with the loss there after it, as far as they are asked for; called by every rank."""
    run = set_up(cfg, groups)
    run.window.push(torch.linspace(0.8, 1.6, 9))
    validation = open_validation(run)
    assert validation is not None
    figures, norms, losses = {}, [], []
    if evaluated:
        figures = dataclasses.asdict(validation_figures(run, validation, iteration=0))
    run.policy.train_mode()
    for number, batch in enumerate(run.batches() if is_trained else ()):
        compute_gradients(run, batch)
        norms.append(update_weights(run))
        if evaluated:
            losses.append(validation_figures(run, validation, iteration=number).loss)
    figures = {
        name: each for name, each in figures.items() if name != "time_s" and each is not None
    }
    return {"figures": figures, "norms": norms, "losses": losses}


def found_by_ranks(cases: Mapping[str, RunConfig]) -> dict[str, Any]:
    """All cases, with one set of process groups a layout; called by every rank."""
    layouts = CachedLayouts()
    found: dict[str, Any] = {}
    for name, cfg in cases.items():
        groups = layouts.switch_to(cfg.parallel)
        is_trained = name.endswith("trained")
        found[name] = found_of(cfg, groups, is_trained=is_trained)
        if is_trained:
            without = found_of(cfg, groups, evaluated=False, is_trained=True)
            found[name]["norms without"] = without["norms"]
    return found
