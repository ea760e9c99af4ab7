"""Validation: training does not notice it, and its figures are those of plain computations over
each sample once."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.parallel.groups import Groups
from megatron_vico.training.setup import Run
from megatron_vico.training.trainer import train
from megatron_vico.training.validation import ValidationSet, open_validation, validation_figures
from tests.packs import WholePack, whole_packs
from tests.toy_data import write_conversations
from tests.training_runs import ToyData, make_toy_shards, read_metrics, toy_config
from tests.unit.training.test_steps import main_grads, move_away, naive_loss, start_run
from tests.unit.vico.test_consistency import naive_kl

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
    stage: str, toy_data: ToyData, base_checkpoint: Path, valid_path: str, tmp_path: Path
) -> None:
    """Bit for bit: losses, norms, thresholds and what a checkpoint holds; and a run that resumes
    validates as one."""
    source = {} if stage == "pretrain" else {"pretrained_checkpoint": str(base_checkpoint)}
    source |= {"reference_load": str(base_checkpoint)} if stage == "router" else {}
    source |= {"drop_path_rate": 0.3} if stage == "pretrain" else {}
    plain = toy_config(toy_data, stage, **source, train_iters=5, save=str(tmp_path / "plain"))
    train(plain)
    validated = dataclasses.replace(
        plain,
        data=dataclasses.replace(plain.data, valid_data_path=(valid_path,)),
        training=dataclasses.replace(plain.training, eval_interval=2),
        checkpoint=dataclasses.replace(
            plain.checkpoint, save=str(tmp_path / "valid"), load=str(tmp_path / "valid")
        ),
    )
    train(
        dataclasses.replace(
            validated, training=dataclasses.replace(validated.training, exit_interval=3)
        )
    )
    train(validated)
    rows = read_metrics(tmp_path / "valid")
    steps = [row for row in rows if "valid_loss" not in row]
    for found_step, step in zip(steps, read_metrics(tmp_path / "plain"), strict=True):
        assert {**found_step, "step_time_s": 0} == {**step, "step_time_s": 0}
    found = [row for row in rows if "valid_loss" in row]
    assert [row["iteration"] for row in found] == [2, 4, 5]
    assert len({row["valid_samples"] for row in found}) == 1
    for row in found:
        assert ("valid_loss_all_compressed" in row) == (stage in ("warmup", "consistency"))
        assert ("valid_router_accuracy" in row) == (stage == "router")
    assert found[0]["valid_loss"] != found[1]["valid_loss"]


def test_nothing_is_left_behind(
    toy_data: ToyData, base_checkpoint: Path, valid_path: str, groups: Groups
) -> None:
    """Gradients, random state and training mode; the same values each time, with a worker too."""
    found = []
    for num_workers in (0, 1):
        run = start_run(
            toy_data,
            "consistency",
            base_checkpoint,
            groups,
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


def test_kl_is_a_plain_mean_over_samples(
    toy_data: ToyData, base_checkpoint: Path, valid_path: str, groups: Groups
) -> None:
    """Under the pack's own plan and with all compressed, whatever the run's seed. Measured:
    4e-7."""
    figures = []
    for seed in (1, 2):
        run = start_run(
            toy_data,
            "consistency",
            base_checkpoint,
            groups,
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
    xi, everything = [], []
    with torch.no_grad():
        for pack in each_pack_once(validation):
            target = naive_loss(run.reference.encoder, run.reference.head, pack, view=None)
            for view, means in ((0, xi), (1, everything)):
                logits = naive_loss(
                    run.policy.encoder.eval(), run.policy.head.eval(), pack, view=view
                )
                means += mean_per_sample(naive_kl(target, logits), pack)
            assert pack.policies[1].compressed.all()
    assert len(xi) == figures[1].samples == NUM_SAMPLES
    assert figures[1].loss == pytest.approx(sum(xi) / NUM_SAMPLES, rel=2e-6)
    assert figures[1].loss_all_compressed == pytest.approx(sum(everything) / NUM_SAMPLES, rel=2e-6)
    assert figures[1].loss != figures[1].loss_all_compressed


def test_cross_entropy_is_a_plain_mean_over_samples(
    toy_data: ToyData, base_checkpoint: Path, valid_path: str, groups: Groups
) -> None:
    run = start_run(toy_data, "pretrain", base_checkpoint, groups, valid_data_path=(valid_path,))
    figures = validation_figures(run, opened(run), iteration=1)
    means = []
    with torch.no_grad():
        for pack in each_pack_once(opened(run)):
            logits = naive_loss(run.policy.encoder.eval(), run.policy.head.eval(), pack, view=None)
            means += mean_per_sample(F.cross_entropy(logits, pack.labels, reduction="none"), pack)
    assert figures.samples == NUM_SAMPLES
    assert figures.loss == pytest.approx(sum(means) / NUM_SAMPLES, rel=2e-6)


def test_router_labels_come_from_the_window_as_it_is(
    toy_data: ToyData, base_checkpoint: Path, valid_path: str, groups: Groups
) -> None:
    run = start_run(toy_data, "router", base_checkpoint, groups, valid_data_path=(valid_path,))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in run.policy.head.parameters():
            param += 0.02 * torch.randn(param.shape, generator=generator)
    run.window.push(torch.tensor([0.9, 1.0, 1.1]))
    figures = validation_figures(run, opened(run), iteration=1)
    assert run.window.state().tolist() == pytest.approx([0.9, 1.0, 1.1])
    assert run.reference is not None
    eps, tau = run.cfg.stage.router_eps, float(run.window.threshold())
    losses, right = [], []
    with torch.no_grad():
        for pack in each_pack_once(opened(run)):
            target = naive_loss(run.reference.encoder, run.reference.head, pack, view=None)
            kl = [
                naive_kl(target, naive_loss(run.policy.encoder, run.policy.head, pack, view=view))
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


def test_equal_policy_and_reference_without_images_give_exactly_zero(
    toy_data: ToyData, base_checkpoint: Path, groups: Groups, tmp_path: Path
) -> None:
    jsonl = write_conversations(tmp_path, num_samples=6, images_per_sample=(0,))
    text = make_toy_shards(tmp_path, jsonl, toy_data.tokenizer).shards
    run = start_run(toy_data, "consistency", base_checkpoint, groups, valid_data_path=(str(text),))
    figures = validation_figures(run, opened(run), iteration=1)
    assert (figures.samples, figures.loss, figures.loss_all_compressed) == (6, 0.0, 0.0)
    move_away(run)
    assert validation_figures(run, opened(run), iteration=1).loss > 0


def test_without_a_sample_to_ask_the_router_about_no_figure_looks_perfect(
    toy_data: ToyData, base_checkpoint: Path, groups: Groups, tmp_path: Path
) -> None:
    jsonl = write_conversations(tmp_path, num_samples=2, images_per_sample=(0,))
    text = make_toy_shards(tmp_path, jsonl, toy_data.tokenizer).shards
    run = start_run(toy_data, "router", base_checkpoint, groups, valid_data_path=(str(text),))
    run.window.push(torch.tensor([1.0]))
    figures = validation_figures(run, opened(run), iteration=1)
    assert figures.samples == 0
    assert math.isnan(figures.loss)


def test_a_number_before_a_folder_weighs_it_and_takes_the_same_part_each_time(
    toy_data: ToyData, base_checkpoint: Path, valid_path: str, groups: Groups
) -> None:
    run = start_run(toy_data, "pretrain", base_checkpoint, groups, valid_data_path=(valid_path,))

    def figures(*words: str) -> tuple[int, float]:
        data = dataclasses.replace(run.cfg.data, valid_data_path=(*words, valid_path))
        validation = opened(dataclasses.replace(run, cfg=dataclasses.replace(run.cfg, data=data)))
        first, second = (validation_figures(run, validation, iteration=step) for step in (1, 2))
        assert (first.samples, first.loss) == (second.samples, second.loss)
        return first.samples, first.loss

    samples, loss = figures()
    assert figures("2") == (2 * samples, pytest.approx(loss, rel=2e-6))
    assert figures("0.3")[0] == 3


def test_some_batches_are_the_first_ones(
    toy_data: ToyData, base_checkpoint: Path, valid_path: str, groups: Groups
) -> None:
    options: dict[str, Any] = {"valid_data_path": (valid_path,)}
    run = start_run(toy_data, "pretrain", base_checkpoint, groups, **options, eval_iters=1)
    validation = opened(run)
    assert validation.loader is not None
    first = sum(len(pack.keys) for pack in whole_packs(next(iter(validation.loader))))
    assert validation_figures(run, validation, iteration=1).samples == first < NUM_SAMPLES
    with pytest.raises(
        ConfigError,
        match=r"--eval-iters 3: the 3 packs .* make 2 global batches of 2; use at most 2",
    ):
        open_validation(
            start_run(toy_data, "pretrain", base_checkpoint, groups, **options, eval_iters=3)
        )
    assert open_validation(start_run(toy_data, "pretrain", base_checkpoint, groups)) is None


def test_a_sample_that_does_not_fit_is_found_before_the_first_step(
    toy_data: ToyData, base_checkpoint: Path, valid_path: str, groups: Groups
) -> None:
    run = start_run(toy_data, "pretrain", base_checkpoint, groups, valid_data_path=(valid_path,))
    small = dataclasses.replace(run.cfg.data, seq_length=40)
    with pytest.raises(SampleError, match="a pack holds 40"):
        open_validation(dataclasses.replace(run, cfg=dataclasses.replace(run.cfg, data=small)))
