"""`vico plan`: what a run takes of each kind of rank, from its real step and without its GPUs.

Exit status 2 where it does not fit.
"""

import argparse
import dataclasses
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vico import files
from megatron_vico.checkpoint.run_folder import resolve_model
from megatron_vico.cli.command_line import refuse_less
from megatron_vico.config.flags import parse
from megatron_vico.config.registry import ModelConfig
from megatron_vico.config.schema import RunConfig
from megatron_vico.config.validate import validate
from megatron_vico.errors import ConfigError, nearest
from megatron_vico.planning.cards import CARDS, RESERVE

if TYPE_CHECKING:  # with torch, which --help does without
    from megatron_vico.planning.closed_forms import Machine

SHOWN = 12
"""Layouts that --search prints."""


def main(arguments: Sequence[str]) -> int:
    """Play the ranks, print what they take, and say whether it fits.

    Args:
        arguments: the words after `plan`.

    Returns:
        0, or 2 if a rank does not fit on its card.

    Raises:
        ConfigError: if the run cannot work.
    """
    own = _own_flags()
    given, rest = own.parse_known_args(arguments)
    if given.help:
        print(own.format_help())
        return 0
    _check(given)
    cfg, world_size = parse(rest), given.world_size
    from megatron_vico.planning.closed_forms import estimate
    from megatron_vico.planning.search import machine_of

    model = resolve_model(cfg)
    machine = machine_of(model, given.efficiency)
    if given.search:
        _search(cfg, model, given, machine)
        return 0
    validate(cfg, world_size, model=model)
    if given.rank is not None and not 0 <= given.rank < world_size:
        raise ConfigError(f"--rank {given.rank} of {world_size}: use 0 to {world_size - 1}.")
    _prepare()
    from megatron_vico.planning import plan, report

    chosen = None if given.rank is None else {"chosen": given.rank}
    ranks = chosen or plan.ranks_that_differ(cfg, world_size)
    packs = 0 if given.quick else given.packs
    played = plan.plan_ranks(
        cfg, model, world_size=world_size, ranks=list(ranks.values()), packs=packs
    )
    plans = dict(zip(ranks, played, strict=True))
    print(
        f"stage {cfg.stage.stage} of {model.name} on {world_size} {given.gpu}:"
        f" --seq-length {cfg.data.seq_length}, --global-batch-size {cfg.training.global_batch_size}"
    )
    print("\n".join(report.memory_table(plans, given.gpu)))
    for name, found in plans.items():
        print("\n".join(report.rank_details(name, found)))
    time = estimate(cfg, model, world_size=world_size, machine=machine)
    print("\n" + report.time_line(time, machine, fp8=cfg.parallel.fp8_format is not None))
    worst = max(plans.values(), key=lambda found: found.peak_bytes)
    fits = report.shortage(worst, given.gpu) <= 0
    if given.json is not None:
        contents = {
            "model": model.name,
            "stage": cfg.stage.stage,
            "world_size": world_size,
            "gpu": given.gpu,
            "fits": fits,
            "room_bytes": (1 - RESERVE) * CARDS[given.gpu],
            "expected_s": time.expected_s,
            "floor_s": time.floor_s,
            "efficiency": machine.efficiency,
            "ranks": {name: dataclasses.asdict(found) for name, found in plans.items()},
        }
        files.write_json(given.json, contents, sort_keys=False)
    print("\n" + report.verdict(worst, given.gpu))
    if fits:
        return 0
    nearest_fit = plan.nearest_that_fits(cfg, model, worst, world_size=world_size, gpu=given.gpu)
    print(f"would fit: {nearest_fit or 'no larger card and no more ranks of this layout'}")
    return 2


def _check(given: argparse.Namespace) -> None:
    """ConfigError if a flag has a value that no run could have."""
    if given.gpu not in CARDS:
        known = ", ".join(f"{name} ({size / 1e9:.1f} GB)" for name, size in CARDS.items())
        raise ConfigError(f"--gpu {given.gpu}: known are {known}{nearest(given.gpu, CARDS)}")
    refuse_less(given, world_size=1, packs=1)
    files.refuse_unwritable("--json", given.json)
    if given.efficiency is not None and not 0 < given.efficiency <= 1:
        raise ConfigError(f"--efficiency {given.efficiency}: a share of the GPU's rate, in (0, 1].")


def _search(
    cfg: RunConfig, model: ModelConfig, given: argparse.Namespace, machine: "Machine"
) -> None:
    """Print the layouts that fit, best first; ConfigError if there are none."""
    from megatron_vico.planning.search import search, table

    found = search(cfg, model, world_size=given.world_size, gpu=given.gpu, machine=machine)
    print(
        f"stage {cfg.stage.stage} of {model.name} on {given.world_size} {given.gpu}: {len(found)}"
        f" layouts fit; by formula, at {machine.efficiency:.0%} of"
        f" {machine.flops_per_s / 1e12:.0f} TFLOP/s; run `vico plan` with the one you choose"
    )
    print("\n".join(table(found[:SHOWN], world_size=given.world_size)))


def _prepare() -> None:
    """Make "cuda" mean "meta"; before the first import of megatron."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also where there are GPUs: none is touched
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # megatron's notes, of every module
    from megatron_vico import cpu_stand_in

    cpu_stand_in.install("meta")


def _own_flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vico plan",
        usage="%(prog)s --world-size N --gpu {h100,h200} [--recipe RECIPE.yaml] [flags of train]",
        description="Run the real step of some ranks without GPU, weights or data, and say what it"
        " takes. Exit status 2: it does not fit.",
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this")
    parser.add_argument("--world-size", type=int, default=1, help="ranks of the run")
    parser.add_argument("--gpu", default="h200", help="kind of card: h100 (80 GB) or h200")
    parser.add_argument(
        "--rank",
        type=int,
        help="only this rank; unset, one of the first, a middle and the last stage",
    )
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument(
        "--packs",
        type=int,
        help="run steps of about so many packs and work out a whole one; unset, run that",
    )
    steps.add_argument(
        "--quick", action="store_true", help="the same with the fewest packs that tell"
    )
    parser.add_argument(
        "--search", action="store_true", help="list layouts that fit, by formula, best first"
    )
    parser.add_argument(
        "--efficiency",
        type=float,
        help="expected share of the GPU's bf16 rate; unset, 0.45, with experts 0.3",
    )
    parser.add_argument("--json", type=Path, help="also write all of it to this file")
    return parser
