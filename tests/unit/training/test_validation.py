"""Validation: training does not notice it, and its figures are those of plain computations over
each sample once."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vico.config.schema import RunConfig
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.training.setup import Run
from megatron_vico.training.trainer import train
from megatron_vico.training.validation import ValidationSet, open_validation, validation_figures
from tests.packs import WholePack, whole_packs
from tests.toy_data import write_conversations
from tests.training_runs import ToyData, make_toy_shards, read_metrics, untimed, weights_of
from tests.unit.models.heads.kl_heads import naive_kl
from tests.unit.training.test_steps import add_noise, main_grads, move_away, naive_logits

NUM_SAMPLES = 10


@pytest.fixture(scope="module")
def valid_path(toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten samples, so that a global batch of two packs of four is filled up with one of the next
    epoch."""
    folder = tmp_path_factory.mktemp("valid")
    jsonl = write_conversations(folder, num_samples=NUM_SAMPLES, seed=7)
    return str(make_toy_shards(folder, jsonl, toy_data.tokenizer).shards)


def opened(run: Run) -> ValidationSet:
    validation = open_validation(run)
    assert validation is not None
    return validation


def each_pack_once(validation: ValidationSet) -> list[WholePack]:
    """The packs of one epoch, as the loader makes them."""
    assert validation.loader is not None
    packs = [pack for blocks in validation.loader for pack in whole_packs(blocks)][
        : validation.num_packs
    ]
    assert sum(len(pack.keys) for pack in packs) == NUM_SAMPLES
    return packs


def mean_per_sample(values_R: Tensor, pack: WholePack) -> list[float]:
    return [
        float(values_R[pack.sample_of_row == sample].mean()) for sample in range(len(pack.keys))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "warmup", "consistency", "router"])
def test_training_does_not_notice(
    stage: str,
    stage_config: Callable[..., RunConfig],
    plain_run: Callable[[str], tuple[Path, dict[str, Any]]],
    valid_path: str,
    tmp_path: Path,
) -> None:
    """Nor of a resume, bit for bit: losses, norms, the window behind the router's threshold, and
    weights; and a run that resumes validates as one."""
    plain, options = plain_run(stage)
    options = options | {"valid_data_path": (valid_path,), "eval_interval": 2}
    train(stage_config(stage, **options, save=str(tmp_path), exit_interval=3))
    cfg = stage_config(stage, **options, save=str(tmp_path), load=str(tmp_path))
    assert [row["iteration"] for row in read_metrics(tmp_path)] == [1, 2, 2, 3]
    train(cfg)
    rows = read_metrics(tmp_path)
    steps = [row for row in rows if "valid_loss" not in row]
    for found_step, step in zip(steps, read_metrics(plain), strict=True):
        assert untimed(found_step) == untimed(step)
    found = [row for row in rows if "valid_loss" in row]
    assert [row["iteration"] for row in found] == [2, 4, 5]
    assert len({row["valid_samples"] for row in found}) == 1
    for row in found:
        assert ("valid_loss_all_compressed" in row) == (stage in ("warmup", "consistency"))
        assert ("valid_router_accuracy" in row) == (stage == "router")
    assert found[0]["valid_loss"] != found[1]["valid_loss"]
    for cut, whole in zip(weights_of(cfg, tmp_path), weights_of(cfg, plain), strict=True):
        expected = whole.state_dict()
        for name, param in cut.named_parameters():
            assert torch.equal(param, expected[name]), name


@pytest.mark.slow
def test_nothing_is_left_behind(start: Callable[..., Run], valid_path: str) -> None:
    """Gradients, random state and training mode; the same values each time, with a worker too."""
    found = []
    for num_workers in (0, 1):
        run = start(
            "consistency",
            valid_data_path=(valid_path,),
            num_workers=num_workers,
            train_modules=("vit", "connector_4x", "connector_16x", "language_model"),
            drop_path_rate=0.3,
        )
        move_away(run)
        validation = opened(run)
        run.policy.train_mode()
        modes = [module.training for module in run.policy.encoder.modules()]
        for grad in (param.main_grad for param in run.policy.head.parameters()):
            grad.fill_(3.0)
        before, random = main_grads(run), torch.get_rng_state()
        for _ in range(2):
            figures = validation_figures(run, validation, iteration=1)
            found.append((figures.loss, figures.loss_all_compressed, figures.samples))
            assert torch.equal(random, torch.get_rng_state())
        assert modes == [module.training for module in run.policy.encoder.modules()]
        assert all(torch.equal(grad, before[name]) for name, grad in main_grads(run).items())
        assert all(param.grad is None for param in run.policy.encoder.parameters())
    assert len(set(found)) == 1


@pytest.mark.slow
def test_kl_is_a_plain_mean_over_samples(start: Callable[..., Run], valid_path: str) -> None:
    """Under the pack's own plan and with all compressed, whatever the run's seed. Measured:
    4e-7."""
    figures = []
    for seed in (1, 2):
        run = start(
            "consistency",
            valid_data_path=(valid_path,),
            num_workers=0,
            seed=seed,
        )
        move_away(run)
        validation = opened(run)
        assert validation.num_packs % 2 == 1
        figures.append(validation_figures(run, validation, iteration=1))
    assert figures[0].loss == figures[1].loss
    assert run.reference is not None
    validation = opened(run)
    run.policy.eval_mode()
    xi, everything = [], []
    with torch.no_grad():
        for pack in each_pack_once(validation):
            target = naive_logits(run.reference.encoder, run.reference.head, pack, view=None)
            for view, means in ((0, xi), (1, everything)):
                logits = naive_logits(run.policy.encoder, run.policy.head, pack, view=view)
                means += mean_per_sample(naive_kl(target, logits), pack)
            assert pack.policies[1].compressed.all()
    assert len(xi) == figures[1].samples == NUM_SAMPLES
    assert figures[1].loss == pytest.approx(sum(xi) / NUM_SAMPLES, rel=2e-6)
    assert figures[1].loss_all_compressed == pytest.approx(sum(everything) / NUM_SAMPLES, rel=2e-6)
    assert figures[1].loss != figures[1].loss_all_compressed


def test_cross_entropy_is_a_plain_mean_over_samples(
    start: Callable[..., Run], valid_path: str
) -> None:
    run = start("pretrain", valid_data_path=(valid_path,))
    figures = validation_figures(run, opened(run), iteration=1)
    run.policy.eval_mode()
    means = []
    with torch.no_grad():
        for pack in each_pack_once(opened(run)):
            logits = naive_logits(
                run.policy.encoder.eval(), run.policy.head.eval(), pack, view=None
            )
            means += mean_per_sample(F.cross_entropy(logits, pack.labels, reduction="none"), pack)
    assert figures.samples == NUM_SAMPLES
    assert figures.loss == pytest.approx(sum(means) / NUM_SAMPLES, rel=2e-6)


def test_router_labels_come_from_the_window_as_it_is(
    start: Callable[..., Run], valid_path: str
) -> None:
    run = start("router", valid_data_path=(valid_path,))
    add_noise(run.policy.head.parameters())
    run.window.push(torch.tensor([0.9, 1.0, 1.1]))
    figures = validation_figures(run, opened(run), iteration=1)
    assert run.window.state().tolist() == pytest.approx([0.9, 1.0, 1.1])
    assert run.reference is not None
    eps, tau = run.cfg.stage.router_eps, float(run.window.threshold())
    losses, right = [], []
    with torch.no_grad():
        for pack in each_pack_once(opened(run)):
            target = naive_logits(run.reference.encoder, run.reference.head, pack, view=None)
            kl = [
                naive_kl(target, naive_logits(run.policy.encoder, run.policy.head, pack, view=view))
                for view in (0, 1)
            ]
            none, one = (mean_per_sample(each, pack) for each in kl)
            features = run.policy.encoder.features(run.policy.encoder.normalise(pack.tiles))
            for tile, sample in zip(
                pack.router_tiles, pack.router_tile_sample.tolist(), strict=True
            ):
                label = int((one[sample] + eps) / (none[sample] + eps) >= tau)
                logits = run.policy.encoder.vir(features[tile][None])[0]
                losses.append(float(F.cross_entropy(logits, torch.tensor(label))))
                right.append(int(logits.argmax()) == label)
    assert 0 < figures.samples == len(losses) < NUM_SAMPLES
    assert figures.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert figures.router_accuracy == pytest.approx(sum(right) / len(right))


def test_without_images_kl_is_exactly_zero_and_the_router_has_no_figure(
    toy_data: ToyData, start: Callable[..., Run], tmp_path: Path
) -> None:
    jsonl = write_conversations(tmp_path, num_samples=6, images_per_sample=(0,))
    text = (str(make_toy_shards(tmp_path, jsonl, toy_data.tokenizer).shards),)
    run = start("consistency", valid_data_path=text)
    figures = validation_figures(run, opened(run), iteration=1)
    assert (figures.samples, figures.loss, figures.loss_all_compressed) == (6, 0.0, 0.0)
    move_away(run)
    assert validation_figures(run, opened(run), iteration=1).loss > 0
    run = start("router", valid_data_path=text)
    run.window.push(torch.tensor([1.0]))
    figures = validation_figures(run, opened(run), iteration=1)
    assert figures.samples == 0
    assert math.isnan(figures.loss), "no loss looks perfect"


def test_a_number_before_a_folder_weighs_it_and_takes_the_same_part_each_time(
    start: Callable[..., Run], valid_path: str
) -> None:
    run = start("pretrain", valid_data_path=(valid_path,))

    def figures(*words: str) -> tuple[int, float]:
        data = dataclasses.replace(run.cfg.data, valid_data_path=(*words, valid_path))
        validation = opened(dataclasses.replace(run, cfg=dataclasses.replace(run.cfg, data=data)))
        first, second = (validation_figures(run, validation, iteration=step) for step in (1, 2))
        assert (first.samples, first.loss) == (second.samples, second.loss)
        return first.samples, first.loss

    samples, loss = figures()
    assert figures("2") == (2 * samples, pytest.approx(loss, rel=2e-6))
    assert figures("0.3")[0] == 3


def test_some_batches_are_the_first_ones(start: Callable[..., Run], valid_path: str) -> None:
    run = start("pretrain", valid_data_path=(valid_path,), eval_iters=1)
    validation = opened(run)
    assert validation.loader is not None
    first = sum(len(pack.keys) for pack in whole_packs(next(iter(validation.loader))))
    assert validation_figures(run, validation, iteration=1).samples == first < NUM_SAMPLES
    assert open_validation(start("pretrain")) is None


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        (
            {"eval_iters": 3},
            ConfigError,
            r"--eval-iters 3: the 3 packs .* make 2 global batches of 2; use at most 2",
        ),
        ({"seq_length": 40}, SampleError, "a pack holds 40"),
    ],
)
def test_what_does_not_fit_is_found_before_the_first_step(
    option: dict[str, int],
    error: type[Exception],
    message: str,
    start: Callable[..., Run],
    stage_config: Callable[..., RunConfig],
    valid_path: str,
) -> None:
    cfg = stage_config("pretrain", valid_data_path=(valid_path,), **option)
    with pytest.raises(error, match=message):
        open_validation(dataclasses.replace(start("pretrain"), cfg=cfg))
