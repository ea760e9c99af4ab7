"""Runs of the trainer on synthetic packs that the benchmarks measure, from fresh weights."""

import dataclasses
import itertools

from torch import nn

from megatron_vico.checkpoint.training_checkpoint import Modules
from megatron_vico.config.registry import ModelConfig, get_model_config
from megatron_vico.config.schema import RunConfig
from megatron_vico.config.stages import Stage
from megatron_vico.parallel.batch import StepBatch, share_step
from megatron_vico.parallel.groups import Groups
from megatron_vico.planning.synthetic_packs import PackShape, synthetic_pack
from megatron_vico.training import setup
from megatron_vico.training.bad_steps import StepWatch
from megatron_vico.training.data_state import DataState
from megatron_vico.training.optimizer import build_optimizer, build_scheduler
from megatron_vico.training.policy import wrap
from megatron_vico.training.step_clock import StepClock
from megatron_vico.vico.router_targets import RatioWindow


def benchmark_model(name: str) -> ModelConfig:
    """A preset, or the benchmark's own: 8 layers of 256, a ViT of 4 of 128, 64 tokens a tile."""
    if name != "benchmark":
        return get_model_config(name)
    toy = get_model_config("toy")
    return dataclasses.replace(
        toy,
        name=name,
        vision=dataclasses.replace(
            toy.vision,
            hidden_size=128,
            num_layers=4,
            ffn_hidden_size=512,
            image_size=128,
            patch_size=8,
        ),
        language=dataclasses.replace(
            toy.language,
            hidden_size=256,
            num_layers=8,
            num_query_groups=2,
            head_dim=64,
            ffn_hidden_size=768,
            vocab_size=4096,
            rope_theta=1e6,
        ),
    )


def build_run(cfg: RunConfig, model: ModelConfig, groups: Groups) -> setup.Run:
    """What `training/setup.py` sets up, from fresh weights; policy and reference have the same."""
    encoder, chunks = setup.build_modules(cfg, model, groups)
    policy = wrap(encoder, chunks, cfg, groups=groups)
    optimizer = build_optimizer(policy, cfg, groups=groups)
    reference = None
    if cfg.stage.spec.needs_reference:

        def load(modules: Modules) -> None:
            parts = ([each] if isinstance(each, nn.Module) else each for each in modules.values())
            frozen = itertools.chain.from_iterable(parts)
            for reference_part, policy_part in zip(frozen, (*chunks, encoder), strict=True):
                reference_part.load_state_dict(policy_part.state_dict())

        reference = setup.build_reference(cfg, model, policy, groups, load=load)
        assert reference.shares_vit == ("vit" not in policy.trained)
    policy.train_mode()
    return setup.Run(
        cfg=cfg,
        groups=groups,
        model=model,
        policy=policy,
        reference=reference,
        watch=StepWatch(cfg.training),
        window=RatioWindow(size=1, percentile=50.0),
        clock=StepClock(groups.device),
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, cfg.optimizer, cfg.training),
        data=DataState.of(None, max_skipped_share=0.0, restored=None),
        iteration=0,
        trained_so_far=None,
    )


def make_batch(
    cfg: RunConfig,
    *,
    model: ModelConfig,
    stage: Stage,
    step: int,
    num_packs: int,
    pack_tokens: int,
    groups: Groups,
) -> StepBatch:
    """One step's packs of this replica; the two stages get the same ones for the same step."""
    packs = None
    shape = PackShape.of_length(pack_tokens, model=model)
    if groups.replica.rank() == 0:
        first = step * cfg.training.global_batch_size + groups.dp_rank * num_packs
        packs = [
            synthetic_pack(
                shape,
                model=model,
                stage=stage,
                number=first + index,
                samples_in_global_batch=cfg.training.global_batch_size * len(shape.tiles),
            )
            for index in range(num_packs)
        ]
    return share_step(packs, groups=groups)


def stage_config(cfg: RunConfig, stage: Stage) -> RunConfig:
    """The run of a stage with its ViT frozen."""
    options = dataclasses.replace(cfg.stage, stage=stage, train_modules=None)
    trained = tuple(module for module in options.trained if module != "vit")
    return dataclasses.replace(cfg, stage=dataclasses.replace(options, train_modules=trained))
