"""What a step holds in memory, in bytes of real tensors: recompute acts, nothing stays behind."""

import dataclasses
import gc
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vico.config.registry import get_model_config
from megatron_vico.config.schema import RunConfig
from megatron_vico.parallel.batch import StepBatch, share_step
from megatron_vico.parallel.groups import Groups
from megatron_vico.parallel.streams import StreamCut, language_inputs
from megatron_vico.training import setup
from megatron_vico.training.setup import Run, build_modules
from megatron_vico.training.vision import VisualTokens, tile_features, visual_tokens
from tests.packs import as_blocks
from tests.peak_bytes import PeakBytes
from tests.unit.training.test_steps import (
    gradients_of,
    main_grads,
    move_away,
    next_packs,
    relative,
)

FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def peak_and_gradients(run: Run) -> tuple[int, Mapping[str, Tensor]]:
    """The most bytes that a step adds, and its gradients."""
    move_away(run)
    packs = next_packs(run)
    with PeakBytes() as seen:
        gradients_of(run, packs)
    return seen.peak, main_grads(run)


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert relative(grad, expected[name]) < 3e-6, name


@pytest.mark.slow
def test_a_frozen_language_model_recomputes_what_gradients_pass_through(
    start: Callable[..., Run],
) -> None:
    """Measured: 9.3 MB without, 4.7 MB with it."""
    plain, grads = peak_and_gradients(start("warmup"))
    recomputed, recomputed_grads = peak_and_gradients(start("warmup", **FULL))
    assert recomputed < 0.6 * plain
    assert_close(recomputed_grads, grads)


def test_a_step_of_experts_leaves_nothing_behind(start: Callable[..., Run]) -> None:
    """Measured: 17,988 bytes, indices of the last permutation; 468,852 if mcore's dispatcher keeps
    its probabilities."""
    run = start(
        "pretrain",
        model_size="toy-moe",
        train_modules=("connector_4x", "language_model"),
        **FULL,
    )
    assert left_after_a_step(run) < 20_000


VISION = ("vit", "connector_4x", "connector_16x", "language_model")


@pytest.mark.slow
def test_a_trained_vit_holds_a_layer_of_a_chunk(start: Callable[..., Run]) -> None:
    """Measured: 7.8 MB with all layers of 16 tiles, 3.1 with one, 1.7 with one of 2 tiles; nothing
    is left (602,032 bytes if a recompute stops early inside the ViT). What is computed again drops
    the same paths."""
    found = {}
    for chunk_tiles, recompute in ((16, "chunk"), (16, "layer"), (2, "layer")):
        run = start(
            "consistency",
            train_modules=VISION,
            drop_path_rate=0.3,
            encoder_chunk_tiles=chunk_tiles,
            encoder_recompute=recompute,
        )
        found[chunk_tiles, recompute] = encoder_backward(run)
    (whole, grads), (layer, layer_grads), (few, _) = found.values()
    assert whole > 2 * layer > 3 * few
    assert_close(layer_grads, grads)
    assert left_after_a_step(run) == 0


def encoder_backward(run: Run) -> tuple[int, Mapping[str, Tensor]]:
    """The most bytes that the encoder's backward pass adds, and its gradients."""
    policy, batch = run.policy, share_step(as_blocks(next_packs(run)), groups=run.groups)
    policy.train_mode()
    policy.zero_grad()
    torch.manual_seed(0)
    tokens = trained_tokens(run, batch, features_NPD=None)
    for index in range(len(batch.packs)):
        of_pack = tokens.of(index)
        assert of_pack is not None
        of_pack.backward(torch.ones_like(of_pack))
    with PeakBytes() as seen:
        tokens.backward()
    return seen.peak, main_grads(run)


def trained_tokens(run: Run, batch: StepBatch, *, features_NPD: Tensor | None) -> VisualTokens:
    """The policy's visual tokens, whose gradients will come back."""
    return visual_tokens(
        run.policy.encoder,
        batch,
        [pack.policies[0].compressed for pack in batch.packs],
        inputs=[
            language_inputs(pack.policies[0], StreamCut(), run.groups.device)
            for pack in batch.packs
        ],
        features_NPD=features_NPD,
        chunk_tiles=run.policy.chunk_tiles,
        trained=True,
        groups=run.groups,
    )


def test_of_connectors_nothing_is_kept_through_the_passes(start: Callable[..., Run]) -> None:
    """Measured: 442 bytes beyond the tokens; 388,324 if a chunk is not computed again."""
    run = start("consistency")
    batch = share_step(as_blocks(next_packs(run)), groups=run.groups)
    features = tile_features(
        run.policy.encoder, batch, run.groups.device, chunk_tiles=run.policy.chunk_tiles
    )
    with PeakBytes() as seen:
        tokens = trained_tokens(run, batch, features_NPD=features)
        gc.collect()
    parts = [tokens.of(index) for index in range(len(batch.packs))]
    assert seen.live <= sum(part.nbytes for part in parts if part is not None) + 1000


def left_after_a_step(run: Run) -> int:
    """Bytes that live after a step's gradients are there, and did not before it."""
    packs = next_packs(run)
    gradients_of(run, packs)  # what is made once is there already
    with PeakBytes() as seen:
        sums = gradients_of(run, packs)
        gc.collect()
    del sums
    return seen.live


def test_connectors_and_router_are_built_on_the_device(groups: Groups) -> None:
    """Measured: nothing in the host's memory beside megatron-core's layers, which the stand-in puts
    there; 3.8 MB otherwise."""
    away = dataclasses.replace(groups, device=torch.device("meta"))
    with PeakBytes() as seen:
        encoder, chunks = build_modules(RunConfig(), get_model_config("toy"), away)
    cores = [*chunks, encoder.vit.transformer]
    in_layers = sum(param.nbytes for module in cores for param in module.parameters())
    assert seen.peak <= in_layers


@pytest.mark.parametrize(("stage", "on_device"), [("warmup", 1), ("consistency", 2)])
def test_what_policy_and_reference_share_is_never_on_the_device_twice(
    stage: str, on_device: int, stage_config: Any, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[dict[str, Any]] = []

    def noted(*args: Any, **options: Any) -> Any:
        built.append(options)
        return build_modules(*args, **options)

    monkeypatch.setattr(setup, "build_modules", noted)
    run = setup.set_up(stage_config(stage), groups)
    assert len(built) == 2
    assert sum(not options.get("on_host") for options in built) == on_device
    assert run.reference is not None
    assert (run.reference.head.gpt is run.policy.head.gpt) == (on_device == 1)


def test_on_the_host_megatrons_layers_are_too(groups: Groups) -> None:
    away = dataclasses.replace(groups, device=torch.device("meta"))
    encoder, chunks = build_modules(RunConfig(), get_model_config("toy"), away, on_host=True)
    for module in (encoder, *chunks):
        assert {param.device.type for param in module.parameters()} == {"cpu"}
        assert module.config.use_cpu_initialization
