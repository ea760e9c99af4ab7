"""The steps against plain autograd: no schedule, no DDP, one graph, a naive KL in float64."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.models.language_model import LanguageModel
from megatron_vico.parallel.batch import share_step
from megatron_vico.parallel.groups import Groups
from megatron_vico.parallel.streams import StreamCut, language_inputs
from megatron_vico.training.consistency_step import consistency_step, pretrain_step
from megatron_vico.training.router_step import router_step
from megatron_vico.training.setup import Run, set_up
from tests.packs import WholePack, as_blocks, whole_packs
from tests.training_runs import ToyData, toy_config
from tests.unit.vico.test_consistency import naive_kl

CPU = torch.device("cpu")


def start_run(data: ToyData, stage: str, base: Path, groups: Groups, **options: object) -> Run:
    source = (
        {}
        if stage == "pretrain"
        else {"pretrained_checkpoint": str(base), "reference_load": str(base)}
    )
    return set_up(toy_config(data, stage, **source, **options), groups)


def next_packs(run: Run) -> list[WholePack]:
    assert run.data.loader is not None
    return whole_packs(next(iter(run.data.loader)))


def move_away(run: Run) -> None:
    """Make the policy differ from the reference, as it does after some training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in (
            run.policy.head,
            run.policy.encoder.connector_4x,
            run.policy.encoder.connector_16x,
        ):
            for param in module.parameters():
                if param.requires_grad:
                    param += 0.02 * torch.randn(param.shape, generator=generator)


def naive_loss(
    encoder: VisionEncoder, language_model: LanguageModel, pack: WholePack, *, view: int | None
) -> Tensor:
    """float64 logits [R, V] of one pack; None: the reference stream, nothing compressed."""
    stream = pack.reference if view is None else pack.policies[view].stream
    plan = None if view is None else pack.policies[view].compressed
    tokens = encoder.visual_tokens(encoder.features(encoder.normalise(pack.tiles)), plan)
    rows = language_model(language_inputs(stream, StreamCut(), CPU), tokens)
    weight = language_model.gpt.output_layer.weight[: language_model.language.vocab_size]
    return rows.double() @ weight.double().T


def main_grads(run: Run) -> dict[str, Tensor]:
    """Gradients as the optimizer will see them, by parameter name."""
    return {
        name: param.main_grad.clone()
        for name, param in named_parameters(run).items()
        if param.requires_grad
    }


def named_parameters(run: Run) -> dict[str, torch.nn.Parameter]:
    """Of language model and encoder."""
    modules = {"language_model": run.policy.head, "encoder": run.policy.encoder}
    return {
        f"{prefix}.{name}": param
        for prefix, module in modules.items()
        for name, param in module.named_parameters()
    }


def relative(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-30))


def assert_gradients_equal(run: Run, loss: Tensor, *, tolerance: float) -> None:
    """Compare what the step left in `main_grad` with autograd's gradients of `loss`."""
    found = main_grads(run)
    named = named_parameters(run)
    params = [named[name] for name in found]
    expected = torch.autograd.grad(loss, params, allow_unused=True)
    moved = 0
    for (name, grad), truth in zip(found.items(), expected, strict=True):
        if truth is None or float(truth.norm()) == 0.0:
            assert float(grad.norm()) == 0.0, name
            continue
        moved += 1
        assert relative(grad, truth) < tolerance, f"{name}: {relative(grad, truth)}"
    assert moved > 3


@pytest.mark.parametrize(
    ("stage", "modules"),
    [
        ("pretrain", ("connector_4x", "language_model")),
        ("pretrain", ("vit", "connector_4x", "language_model")),
        ("warmup", ("connector_16x",)),
        ("consistency", ("connector_4x", "connector_16x", "language_model")),
        ("consistency", ("vit", "connector_4x", "connector_16x", "language_model")),
    ],
)
def test_loss_and_every_gradient_equal_plain_autograd(
    stage: str, modules: tuple[str, ...], toy_data: ToyData, base_checkpoint: Path, groups: Groups
) -> None:
    """Two packs of unequal lengths, some with text only. Measured: loss 3e-7, worst gradient
    7e-7."""
    run = start_run(toy_data, stage, base_checkpoint, groups, train_modules=modules)
    move_away(run)
    packs = next_packs(run)
    assert len(packs) == 2
    run.policy.train_mode()
    run.policy.zero_grad()
    policy = run.policy
    if stage == "pretrain":
        sums = pretrain_step(run, share_step(as_blocks(packs), groups=groups))
        logits = [naive_loss(policy.encoder, policy.head, pack, view=None) for pack in packs]
        rows = [
            F.cross_entropy(each, pack.labels, reduction="none")
            for each, pack in zip(logits, packs, strict=True)
        ]
    else:
        assert run.reference is not None
        sums = consistency_step(run, share_step(as_blocks(packs), groups=groups))
        rows = []
        for pack in packs:
            with torch.no_grad():
                target = naive_loss(run.reference.encoder, run.reference.head, pack, view=None)
            rows.append(naive_kl(target, naive_loss(policy.encoder, policy.head, pack, view=0)))
    loss = sum((each * pack.kl_weight).sum() for each, pack in zip(rows, packs, strict=True))
    assert isinstance(loss, Tensor)
    assert float(sums.loss) == pytest.approx(float(loss), rel=2e-6)
    assert_gradients_equal(run, loss, tolerance=4e-6)


def test_weights_are_means_over_tokens_then_samples(
    toy_data: ToyData, base_checkpoint: Path, groups: Groups
) -> None:
    run = start_run(toy_data, "consistency", base_checkpoint, groups)
    packs = next_packs(run)
    num_samples = sum(len(pack.keys) for pack in packs)
    for pack in packs:
        for sample in range(len(pack.keys)):
            weights = pack.kl_weight[pack.sample_of_row == sample]
            assert weights.sum().item() == pytest.approx(1 / num_samples, rel=1e-6)


@pytest.mark.parametrize("stage", ["warmup", "consistency"])
def test_equal_policy_and_reference_without_compression_give_exactly_zero(
    stage: str, toy_data: ToyData, base_checkpoint: Path, groups: Groups
) -> None:
    run = start_run(toy_data, stage, base_checkpoint, groups)
    packs = [
        dataclasses.replace(
            pack,
            policies=(
                dataclasses.replace(
                    pack.policies[0],
                    compressed=torch.zeros_like(pack.policies[0].compressed),
                    stream=pack.reference,
                ),
            ),
        )
        for pack in next_packs(run)
    ]
    run.policy.train_mode()
    run.policy.zero_grad()
    assert run.reference is not None
    sums = consistency_step(run, share_step(as_blocks(packs), groups=groups))
    assert float(sums.loss) == 0.0
    assert all(float(grad.abs().max()) == 0.0 for grad in main_grads(run).values())


def test_splitting_packs_changes_nothing(
    toy_data: ToyData, base_checkpoint: Path, groups: Groups
) -> None:
    """The same eight samples as two packs of four and as four packs of two. Measured: loss 0,
    gradients 5e-7."""
    found = []
    for per_pack, batch in ((4, 2), (2, 4)):
        run = start_run(
            toy_data,
            "consistency",
            base_checkpoint,
            groups,
            max_samples_per_pack=per_pack,
            global_batch_size=batch,
            packing_window=8,
            seq_length=2000,
            # Belongs to each sample; the shares of `stratified` belong to the pack.
            xi_sampler="bernoulli",
        )
        move_away(run)
        packs = next_packs(run)
        assert len(packs) == batch
        run.policy.train_mode()
        run.policy.zero_grad()
        assert run.reference is not None
        sums = consistency_step(run, share_step(as_blocks(packs), groups=groups))
        found.append(
            (sorted(key for pack in packs for key in pack.keys), float(sums.loss), main_grads(run))
        )
    (keys, loss, grads), (other_keys, other_loss, other_grads) = found
    assert keys == other_keys
    assert loss == pytest.approx(other_loss, rel=2e-6)
    for name, grad in grads.items():
        assert relative(grad, other_grads[name]) < 3e-6, name


@pytest.mark.parametrize("granularity", ["tile", "image"])
def test_router_labels_and_gradients_equal_the_plain_computation(
    granularity: str, toy_data: ToyData, base_checkpoint: Path, groups: Groups
) -> None:
    """Eq. 2-4 sample by sample. Measured: ratio 3e-7, loss 2e-8, worst gradient 4e-6."""
    run = start_run(toy_data, "router", base_checkpoint, groups, router_granularity=granularity)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in run.policy.head.parameters():
            param += 0.02 * torch.randn(param.shape, generator=generator)
    packs = next_packs(run)
    run.policy.train_mode()
    run.policy.zero_grad()
    assert run.reference is not None
    eps = run.cfg.stage.router_eps
    batch = share_step(as_blocks(packs), groups=groups, whole_images=granularity == "image")
    sums = router_step(run, batch)

    ratios, logits = [], []
    policy, reference = run.policy, run.reference
    for pack in packs:
        with torch.no_grad():
            target = naive_loss(reference.encoder, reference.head, pack, view=None)
            views = [naive_loss(policy.encoder, policy.head, pack, view=view) for view in (0, 1)]
            none, one = (naive_kl(target, each) for each in views)
            features = policy.encoder.features(policy.encoder.normalise(pack.tiles))
        assert int(pack.policies[0].compressed.sum()) == 0
        assert (
            sorted(pack.router_tiles.tolist())
            == pack.policies[1].compressed.nonzero().squeeze(1).tolist()
        )
        for sample in range(len(pack.keys)):
            asked = pack.router_tiles[pack.router_tile_sample == sample]
            assert (len(asked) == 0) == (pack.tiles_per_sample[sample] == 0)
            if not len(asked):
                continue
            rows = pack.sample_of_row == sample
            ratios.append((one[rows].mean() + eps) / (none[rows].mean() + eps))
            counts = [len(asked)] if granularity == "image" else None
            logits.append(policy.encoder.vir(features[asked], counts)[0])
    ratio = torch.stack(ratios)
    labels = (ratio >= torch.quantile(ratio, 0.6)).long()
    loss = F.cross_entropy(torch.stack(logits).double(), labels)
    assert run.window.state().tolist() == pytest.approx(ratio.tolist(), rel=2e-6)
    assert float(sums.loss) == pytest.approx(float(loss), rel=1e-5)
    assert sums.router is not None
    assert int(sums.router.questions) == len(labels)
    assert int(sums.router.labelled_compress) == int((labels == 0).sum())
    assert_gradients_equal(run, loss, tolerance=1e-5)


def test_a_frozen_vit_is_shared_and_a_trained_one_is_not(
    toy_data: ToyData, base_checkpoint: Path, groups: Groups
) -> None:
    frozen = start_run(toy_data, "consistency", base_checkpoint, groups)
    assert frozen.reference is not None
    assert frozen.reference.shares_vit
    assert frozen.reference.encoder.vit is frozen.policy.encoder.vit
    assert frozen.reference.encoder.connector_4x is not frozen.policy.encoder.connector_4x
    modules = ("vit", "connector_4x", "connector_16x", "language_model")
    trained = start_run(toy_data, "consistency", base_checkpoint, groups, train_modules=modules)
    assert trained.reference is not None
    assert not trained.reference.shares_vit
    assert trained.reference.encoder.vit is not trained.policy.encoder.vit
    warmup = start_run(toy_data, "warmup", base_checkpoint, groups)
    assert warmup.reference is not None
    assert warmup.reference.head.gpt is warmup.policy.head.gpt


def test_rates_per_module_reach_the_optimizer(
    toy_data: ToyData, base_checkpoint: Path, groups: Groups
) -> None:
    run = start_run(
        toy_data,
        "consistency",
        base_checkpoint,
        groups,
        lr_mult=("connector_16x=3", "language_model=0.5"),
        lr=1e-3,
    )
    rates: dict[float, int] = {}
    for group in run.optimizer.param_groups:
        count = sum(param.numel() for param in group["params"])
        rates[round(group["max_lr"], 9)] = rates.get(round(group["max_lr"], 9), 0) + count
    encoder = run.policy.encoder
    assert rates == {
        0.0005: sum(param.numel() for param in run.policy.head.parameters()),
        0.001: sum(param.numel() for param in encoder.connector_4x.parameters()),
        0.003: sum(param.numel() for param in encoder.connector_16x.parameters()),
    }
