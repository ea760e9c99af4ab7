"""One process plays one rank of a run: its real step, without a GPU, weights, data or other ranks.

"cuda" is torch's "meta" device, whose tensors have a size and no memory; torch's "fake" backend is
a world of which only this rank exists. Host tensors are real: packs, lengths and plans are worked
out as in training. `prepare` goes before the first import of megatron.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_vico.config.registry import ModelConfig
from megatron_vico.config.schema import RunConfig
from megatron_vico.data.load.packed_bytes import unwrap
from megatron_vico.parallel import groups as process_groups
from megatron_vico.parallel.batch import StepBatch, split_step
from megatron_vico.parallel.groups import Groups
from megatron_vico.planning import without_data
from megatron_vico.planning.meter import Counted, Meter
from megatron_vico.planning.synthetic_packs import PackShape, synthetic_pack
from megatron_vico.training import trainer
from megatron_vico.training.bad_steps import StepWatch
from megatron_vico.training.data_state import DataState
from megatron_vico.training.fp8_reference import bf16_config
from megatron_vico.training.profiler import phase
from megatron_vico.training.setup import Modules, Run, build_policy, build_reference
from megatron_vico.training.step_clock import StepClock
from megatron_vico.vico.router_targets import RatioWindow

META = torch.device("meta")
_GROUPS = (
    "dp dp_cp expt_dp intra_dp_cp intra_expt_dp tp_ep expt_tp ep cp pp tp mp tp_ep_pp embd"
    " intra_dist_opt"
)


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a rank was seen to take."""

    static: dict[str, int]
    """Bytes by part between two steps."""

    steps: dict[int, Counted]
    """By packs of the replica, a step of each."""


def dry_run(
    cfg: RunConfig, model: ModelConfig, *, world_size: int, rank: int, num_packs: tuple[int, ...]
) -> DryRun:
    """Run a step for each number of packs of a replica as one rank of many; once in a process.

    The first step is not counted: it makes what stays for good, such as megatron-core's buffer for
    gathered sequences, and would be mistaken for what a pack takes. Its packs are of text, since
    the encoder leaves nothing. `config/validate.py` must accept the run.
    """
    meter = Meter()
    without_data.install(
        meter,
        experts_per_token=model.language.moe_top_k or 0,
        shared=cfg.stage.spec.reference == "start",
    )
    with world(cfg, world_size=world_size, rank=rank) as groups, meter:
        name_groups(meter, groups)
        run = build(bf16_config(cfg), model, groups, meter)
        copies = fp8_copies(cfg, run, meter)
        static = {part: size for part, size in meter.now.items() if size}
        steps = {}
        for number, packs in enumerate(num_packs):
            text_only = {"visual_share": 0.0} if number == 0 else {}
            batch = synthetic_step(run, num_packs=packs, **text_only)
            meter.begin()
            measured_step(run, batch)
            if number > 0:
                steps[packs] = meter.counted
        del copies
    return DryRun(static=static, steps=steps)


def measured_step(run: Run, batch: StepBatch) -> None:
    """What the trainer does for a step."""
    trainer.compute_gradients(run, batch)
    with phase("optimizer"):
        trainer.update_weights(run)


def no_weights(modules: Modules) -> None:
    """They stay as torch made them."""


def build(
    cfg: RunConfig,
    model: ModelConfig,
    groups: Groups,
    meter: Meter,
    *,
    load: Callable[[Modules], None] = no_weights,
) -> Run:
    """A run as `training/setup.py` makes it, with any weights, ready for its second step."""
    device = groups.device
    with meter.building("policy"), device:
        policy, optimizer, scheduler = build_policy(cfg, model, groups, load=load)
    reference = None
    if cfg.stage.spec.needs_reference:
        with meter.building("reference"), device:
            reference = build_reference(cfg, model, policy, groups, load=load)
    run = Run(
        cfg=cfg,
        groups=groups,
        model=model,
        policy=policy,
        reference=reference,
        window=RatioWindow(size=cfg.stage.router_window, percentile=cfg.stage.router_percentile),
        watch=StepWatch(cfg.training),
        clock=StepClock(groups.device),
        optimizer=optimizer,
        scheduler=scheduler,
        data=DataState.of(None, max_skipped_share=0.0, restored=None),
        iteration=0,
        trained_so_far=None,
    )
    with meter.building("optimizer"):
        policy.zero_grad()
        trainer.update_weights(run)  # the first one makes the moments
    policy.train_mode()
    tag(run, meter)
    return run


def fp8_copies(cfg: RunConfig, run: Run, meter: Meter) -> list[Tensor]:
    """TransformerEngine's copies of the policy's matrices in FP8, as they are and transposed."""
    if cfg.parallel.fp8_format is None or cfg.transformer.fp8_param_gather:
        return []
    with meter.building("policy"):
        return [
            torch.empty(2, *weight.shape, dtype=torch.uint8, device=META)
            for chunk in run.policy.language_chunks
            for name, weight in chunk.named_parameters()
            if weight.dim() == 2 and ".layers." in name and "router" not in name
        ]


def tag(run: Run, meter: Meter) -> None:
    """Say which part of the model each static tensor is."""
    policy, reference = run.policy, run.reference
    if reference is not None:
        meter.tag(reference.encoder.parameters(), "reference")
        for chunk in reference.language_chunks:
            meter.tag(chunk.parameters(), "reference")
    for chunk in policy.language_chunks:
        meter.tag(chunk.parameters(), "policy")
    meter.tag(policy.encoder.parameters(), "encoder")
    for optimizer in getattr(run.optimizer, "chained_optimizers", [run.optimizer]):
        groups = optimizer.param_groups  # of the masters
        meter.tag((param for group in groups for param in group["params"]), "optimizer")
    for ddp in policy.ddp_modules:
        meter.tag((getattr(param, "main_grad", None) for param in ddp.parameters()), "gradients")


def synthetic_step(run: Run, *, num_packs: int, visual_share: float = 0.75) -> StepBatch:
    """Full packs of four samples; tiles have a shape only."""
    cfg, model, groups = run.cfg, run.model, run.groups
    shape = PackShape.of_length(cfg.data.seq_length, model=model, visual_share=visual_share)
    block = synthetic_pack(
        shape,
        model=model,
        stage=cfg.stage.stage,
        number=0,
        samples_in_global_batch=cfg.training.global_batch_size * len(shape.tiles),
        tile_size=1,  # a hundred whole ones take 58 MB
    )
    # Equal, so that one more shows what one more takes.
    packs = unwrap(block.packs, block.text) * num_packs
    split = split_step(packs, groups=groups, whole_images=run.whole_images)
    size, num_tiles = model.vision.image_size, split.own.stop - split.own.start
    tiles = torch.zeros(num_tiles, 3, size, size, dtype=torch.uint8)  # on the host, as in training
    return StepBatch(packs=tuple(packs), tiles=tiles, split=split)


@contextmanager
def world(cfg: RunConfig, *, world_size: int, rank: int) -> Iterator[Groups]:
    """Process groups of which this rank alone exists; every call on them returns at once."""
    torch.distributed.init_process_group(
        "fake", rank=rank, world_size=world_size, store=FakeStore()
    )
    process_groups.lay_out(cfg.parallel, timeout_minutes=1)
    yield process_groups.current_groups(seed=cfg.training.seed, device=META, timeout_minutes=1)


def name_groups(meter: Meter, groups: Groups) -> None:
    """Give the meter Megatron's names of process groups."""
    everyone = torch.distributed.group.WORLD
    assert everyone is not None
    meter.groups[everyone.group_name] = "world"
    meter.groups[groups.replica.group_name] = "replica"
    for name in _GROUPS.split():
        group = getattr(groups.language, name, None)
        if group is not None:
            meter.groups.setdefault(group.group_name, name)
