"""Counts a step of each case in real ranks or, run as a script, in dry ones; the same meter.

Usage: run_dry_run.py FOLDER. Writes FOLDER/RANK.json: by case, rows of (phase, call, group), and
the peak of each phase in bytes.
"""

import gc
import json
import multiprocessing
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_vico import cpu_stand_in

DRY = __name__ == "__main__"
if DRY:
    cpu_stand_in.install("meta")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from megatron_vico.config.flags import parse  # noqa: E402
from megatron_vico.config.layout import data_parallel_size  # noqa: E402
from megatron_vico.config.registry import get_model_config  # noqa: E402
from megatron_vico.config.schema import RunConfig  # noqa: E402
from megatron_vico.config.validate import validate  # noqa: E402
from megatron_vico.models.heads import vocabulary  # noqa: E402
from megatron_vico.parallel.groups import Groups  # noqa: E402
from megatron_vico.planning import without_data  # noqa: E402
from megatron_vico.planning.dry_run import (  # noqa: E402
    build,
    measured_step,
    name_groups,
    synthetic_step,
    world,
)
from megatron_vico.planning.meter import BLOCK, Meter  # noqa: E402
from megatron_vico.training.setup import Modules, Run  # noqa: E402

RANKS = 4
COMPARED = (0, 3)
"""Of the first and of the last stage, where there are stages."""

PACKS = 4
DENSE, MOE = "--model-size toy-6b ", "--model-size toy-moe "
TP2_SP = "--tensor-model-parallel-size 2 --sequence-parallel "
PP2 = "--pipeline-model-parallel-size 2 "
VPP2 = PP2 + "--num-layers-per-virtual-pipeline-stage 1 "
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 "
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
EP2 = "--expert-model-parallel-size 2 "
CP2 = "--context-parallel-size 2 "
ALL = "--train-modules vit connector_4x connector_16x language_model "
CASES = {
    "dense tp2 sp pp2 vpp2": DENSE + "--stage consistency " + TP2_SP + VPP2 + FULL + OVERLAP,
    # The layout of 241B-A28B.
    "moe tp2 sp ep2 pp2 vpp2": MOE
    + "--stage consistency --expert-tensor-parallel-size 1 "
    + (TP2_SP + EP2 + VPP2 + FULL),
    "moe cp2 ep2, vit trained": MOE + "--stage consistency " + CP2 + EP2 + ALL,
    "warmup pp2": DENSE + "--stage warmup " + PP2 + FULL,
    "moe router ep2 pp2": MOE + "--stage router " + EP2 + PP2,
    "pretrain cp2, distributed optimizer": DENSE
    + "--stage pretrain --use-distributed-optimizer "
    + CP2,
}


def count(name: str, groups: Groups, meter: Meter) -> dict[str, Any]:
    """A step of a case; of the meter, what must be the same in both."""
    cfg, before = config_of(name), meter.total
    run = build(cfg, get_model_config(cfg.model.model_size), groups, meter, load=_same_weights)
    batch = synthetic_step(run, num_packs=PACKS)
    meter.begin()
    measured_step(run, batch)
    calls, elsewhere = meter.counted.calls.items(), 0 if DRY else _on_host(run)
    return {
        "calls": sorted([key.phase, key.call, key.group, *counts] for key, counts in calls),
        "waits": meter.counted.waits,
        "peak": {phase: size - before - elsewhere for phase, size in meter.counted.peak.items()},
    }


def _on_host(run: Run) -> int:
    """Bytes of what a stage does not use: gone to the host, which is the device of a real run here,
    in the blocks that the meter counts."""
    unused = (getattr(run.policy.encoder, name) for name in run.cfg.stage.spec.unused)
    params = (param for module in unused for param in module.parameters())
    return sum(-(-param.nbytes // BLOCK) * BLOCK for param in params)


def config_of(name: str) -> RunConfig:
    """A case, with so many packs a replica."""
    cfg = parse([*CASES[name].split(), "--seq-length", "256"])
    batch = PACKS * data_parallel_size(cfg.parallel, RANKS)
    cfg = replace(cfg, training=replace(cfg.training, global_batch_size=batch))
    validate(cfg, RANKS, model=get_model_config(cfg.model.model_size))
    return cfg


def _same_weights(modules: Modules) -> None:
    """All equal, so that a reference shares what is frozen, as the dry run takes it."""
    for parts in modules.values():
        for part in [parts] if isinstance(parts, nn.Module) else parts:
            for param in part.parameters():
                param.data.fill_(0.01)


def _balance_routing() -> None:
    """As the dry run has it: token t goes to the experts after those of token t - 1."""
    from megatron.core.transformer.moe.router import TopKRouter

    gating = TopKRouter.gating

    def balanced(self: Any, tokens: Tensor) -> Tensor:
        logits = gating(self, tokens)
        chosen = without_data.balanced_map(
            logits[..., 0].numel(), self.config.num_moe_experts, self.config.moe_router_topk
        )
        return logits + 1e4 * chosen.view(logits.shape).to(logits)

    TopKRouter.gating = balanced


def _floats(tensor: Tensor) -> bool:
    """What both count: on the host there are ids and plans too."""
    return tensor.device.type == ("meta" if DRY else "cpu") and tensor.is_floating_point()


def _play(job: tuple[int, str]) -> dict[str, Any]:
    rank, name = job
    cfg, meter = config_of(name), Meter(counts=_floats)
    model = get_model_config(cfg.model.model_size)
    without_data.install(meter, experts_per_token=model.language.moe_top_k or 0, kernels="torch")
    vocabulary._GPU_BLOCK = vocabulary._CPU_BLOCK
    with world(cfg, world_size=RANKS, rank=rank) as groups, meter:
        name_groups(meter, groups)
        return count(name, groups, meter)


def _dry(folder: Path) -> None:
    jobs = [(rank, name) for rank in COMPARED for name in CASES]
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        found = dict(zip(jobs, pool.map(_play, jobs, chunksize=1), strict=True))
    for rank in COMPARED:
        of_rank = {name: found[rank, name] for name in CASES}
        (folder / f"{rank}.json").write_text(json.dumps(of_rank))


def count_all() -> dict[str, Any]:
    """Every case, in this rank of a running world."""
    from tests.distributed.cached_layouts import CachedLayouts

    _balance_routing()
    layouts, found = CachedLayouts(), {}
    meter = Meter(counts=_floats)
    without_data.watch(meter, kernels="torch")
    for name in CASES:
        groups = layouts.switch_to(config_of(name).parallel)
        gc.collect()  # the case before
        with meter:
            meter.groups.clear()
            name_groups(meter, groups)
            found[name] = count(name, groups, meter)
    return found


if DRY:
    torch.set_num_threads(1)
    _dry(Path(sys.argv[1]))
