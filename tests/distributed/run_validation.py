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


def found_by_ranks(cases: Mapping[str, RunConfig]) -> dict[str, Any]:
    """All cases, with one set of process groups a layout; called by every rank."""
    layouts = CachedLayouts()
    found: dict[str, Any] = {}
    for name, cfg in cases.items():
        groups = layouts.switch_to(cfg.parallel)
        found[name] = {"figures": figures_of(cfg, groups)}
        if name.endswith("trained"):
            found[name]["without"] = trained(cfg, groups, evaluated=False)
            found[name]["with"] = trained(cfg, groups, evaluated=True)
    return found
