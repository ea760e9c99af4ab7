"""The steps against plain autograd: no schedule, no DDP, one graph, a naive KL in float64."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vico.models.internvl import VisionEncoder
from megatron_vico.models.language_model import LanguageModel
from megatron_vico.parallel.batch import share_step
from megatron_vico.parallel.streams import StreamCut, language_inputs
from megatron_vico.training.metrics import StepSums
from megatron_vico.training.setup import Run
from megatron_vico.training.steps import STEPS
from tests.packs import WholePack, as_blocks, whole_packs
from tests.unit.models.heads.kl_heads import naive_kl

CPU = torch.device("cpu")


def next_packs(run: Run) -> list[WholePack]:
    assert run.data.loader is not None
    return whole_packs(next(iter(run.data.loader)))


def gradients_of(run: Run, packs: list[WholePack]) -> StepSums:
    """One step's passes, before the optimizer."""
    run.policy.train_mode()
    run.policy.zero_grad()
    whole_images = run.cfg.stage.router_granularity == "image"
    batch = share_step(as_blocks(packs), groups=run.groups, whole_images=whole_images)
    return STEPS[run.cfg.stage.spec.loss].train(run, batch)


def add_noise(params: Iterable[Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in params:
            param += 0.02 * torch.randn(param.shape, generator=generator)


def move_away(run: Run) -> None:
    """Make the policy differ from the reference, as it does after some training."""
    encoder = run.policy.encoder
    modules = (run.policy.head, encoder.connector_4x, encoder.connector_16x)
    params = itertools.chain.from_iterable(module.parameters() for module in modules)
    add_noise(param for param in params if param.requires_grad)


def naive_logits(
    encoder: VisionEncoder, language_model: LanguageModel, pack: WholePack, *, view: int | None
) -> Tensor:
    """float64 logits [R, V] of one pack; None: the reference stream, nothing compressed."""
    stream = pack.reference if view is None else pack.policies[view]
    encoder.eval()  # where nothing is recomputed, which autograd.grad cannot pass through
    tokens = encoder.visual_tokens(
        encoder.features(encoder.normalise(pack.tiles)), stream.compressed
    )
    rows = language_model(language_inputs(stream, StreamCut(), CPU), tokens)
    weight = language_model.gpt.output_layer.weight[: language_model.language.vocab_size]
    return rows.double() @ weight.double().T


def trained_parameters(run: Run) -> dict[str, nn.Parameter]:
    modules = nn.ModuleDict({"language_model": run.policy.head, "encoder": run.policy.encoder})
    return {name: each for name, each in modules.named_parameters() if each.requires_grad}


def main_grads(run: Run) -> dict[str, Tensor]:
    """Gradients as the optimizer will see them, by parameter name."""
    return {name: param.main_grad.clone() for name, param in trained_parameters(run).items()}


def relative(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-30))


def assert_gradients_equal(run: Run, loss: Tensor, *, tolerance: float) -> None:
    """Compare what the step left in `main_grad` with autograd's gradients of `loss`."""
    params = trained_parameters(run)
    expected = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    moved = 0
    for (name, param), truth in zip(params.items(), expected, strict=True):
        grad = param.main_grad
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
    stage: str, modules: tuple[str, ...], start: Callable[..., Run]
) -> None:
    """Two packs of unequal lengths, some with text only. Measured: loss 3e-7, gradient 7e-7."""
    run = start(stage, train_modules=modules)
    move_away(run)
    packs, policy = next_packs(run), run.policy
    assert len(packs) == 2
    sums = gradients_of(run, packs)
    if stage == "pretrain":
        logits = [naive_logits(policy.encoder, policy.head, pack, view=None) for pack in packs]
        rows = [
            F.cross_entropy(each, pack.labels, reduction="none")
            for each, pack in zip(logits, packs, strict=True)
        ]
    else:
        assert run.reference is not None
        rows = []
        for pack in packs:
            with torch.no_grad():
                target = naive_logits(run.reference.encoder, run.reference.head, pack, view=None)
            rows.append(naive_kl(target, naive_logits(policy.encoder, policy.head, pack, view=0)))
    loss = sum((each * pack.kl_weight).sum() for each, pack in zip(rows, packs, strict=True))
    assert isinstance(loss, Tensor)
    assert float(sums.loss) == pytest.approx(float(loss), rel=2e-6)
    assert_gradients_equal(run, loss, tolerance=4e-6)


@pytest.mark.parametrize("stage", ["warmup", "consistency"])
def test_equal_policy_and_reference_without_compression_give_exactly_zero(
    stage: str, start: Callable[..., Run]
) -> None:
    run = start(stage)
    packs = [dataclasses.replace(pack, policies=(pack.reference,)) for pack in next_packs(run)]
    assert float(gradients_of(run, packs).loss) == 0.0
    assert all(float(grad.abs().max()) == 0.0 for grad in main_grads(run).values())


def test_splitting_packs_changes_nothing(start: Callable[..., Run]) -> None:
    """The same eight samples as two packs of four and as four of two. Measured: loss 0, gradients
    5e-7."""
    found = []
    for per_pack, batch in ((4, 2), (2, 4)):
        sizes = {"max_samples_per_pack": per_pack, "global_batch_size": batch, "seq_length": 2000}
        # "bernoulli" belongs to each sample; the shares of `stratified` belong to the pack.
        run = start("consistency", **sizes, packing_window=8, xi_sampler="bernoulli")
        move_away(run)
        packs = next_packs(run)
        assert len(packs) == batch
        loss = float(gradients_of(run, packs).loss)
        found.append((sorted(key for pack in packs for key in pack.keys), loss, main_grads(run)))
    (keys, loss, grads), (other_keys, other_loss, other_grads) = found
    assert keys == other_keys
    assert loss == pytest.approx(other_loss, rel=2e-6)
    for name, grad in grads.items():
        assert relative(grad, other_grads[name]) < 3e-6, name


@pytest.mark.parametrize("granularity", ["tile", "image"])
def test_router_labels_and_gradients_equal_the_plain_computation(
    granularity: str, start: Callable[..., Run]
) -> None:
    """Eq. 2-4 sample by sample. Measured: ratio 3e-7, loss 2e-8, worst gradient 4e-6."""
    run = start("router", router_granularity=granularity)
    add_noise(run.policy.head.parameters())
    packs, eps = next_packs(run), run.cfg.stage.router_eps
    sums = gradients_of(run, packs)

    ratios, logits = [], []
    policy, reference = run.policy, run.reference
    assert reference is not None
    for pack in packs:
        with torch.no_grad():
            target = naive_logits(reference.encoder, reference.head, pack, view=None)
            views = [naive_logits(policy.encoder, policy.head, pack, view=view) for view in (0, 1)]
            none, one = (naive_kl(target, each) for each in views)
            features = policy.encoder.features(policy.encoder.normalise(pack.tiles))
        assert int(pack.policies[0].compressed.sum()) == 0
        compressed = pack.policies[1].compressed.nonzero().squeeze(1)
        assert sorted(pack.router_tiles.tolist()) == compressed.tolist()
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


@pytest.mark.slow
def test_a_frozen_vit_is_shared_and_a_trained_one_is_not(start: Callable[..., Run]) -> None:
    modules = ("vit", "connector_4x", "connector_16x", "language_model")
    for trained, shares_vit in (modules[1:], True), (modules, False):
        run = start("consistency", train_modules=trained)
        assert run.reference is not None
        assert run.reference.shares_vit == shares_vit
        assert (run.reference.encoder.vit is run.policy.encoder.vit) == shares_vit
        assert run.reference.encoder.connector_4x is not run.policy.encoder.connector_4x
    warmup = start("warmup")
    assert warmup.reference is not None
    assert warmup.reference.head.gpt is warmup.policy.head.gpt


def test_rates_per_module_reach_the_optimizer(start: Callable[..., Run]) -> None:
    rates = ("connector_16x=3", "language_model=0.5")
    run = start("consistency", lr_mult=rates, lr=1e-3)
    found: Counter[float] = Counter()
    for group in run.optimizer.param_groups:
        found[round(group["max_lr"], 9)] += sum(param.numel() for param in group["params"])
    modules = {
        0.0005: run.policy.head,
        0.001: run.policy.encoder.connector_4x,
        0.003: run.policy.encoder.connector_16x,
    }
    assert found == {
        rate: sum(param.numel() for param in module.parameters())
        for rate, module in modules.items()
    }
