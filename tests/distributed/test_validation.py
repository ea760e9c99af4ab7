"""Validation under layouts of two ranks equals one process; one launch runs all cases."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_vico.config.schema import DdpOptions, ParallelOptions, RunConfig
from megatron_vico.config.validate import validate
from megatron_vico.parallel.groups import started
from tests.distributed.launch import on_ranks
from tests.distributed.run_validation import found_by_ranks, found_of
from tests.distributed.step_records import STEPS, save_models
from tests.toy_data import write_conversations
from tests.training_runs import ToyData, make_toy_shards, toy_config

NUM_SAMPLES = 13
TP2: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2: dict[str, Any] = {
    "pipeline_model_parallel_size": 2,
    "num_layers_per_virtual_pipeline_stage": 1,
}
CP2: dict[str, Any] = {"context_parallel_size": 2}
DENSE, MOE = "toy-6b", "toy-moe"
# Buckets so small that each module has its own: with one bucket a missing wait would not show.
BUCKETS = DdpOptions(ddp_bucket_size=3000)
OVERLAP = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}
ALL = {"train_modules": ("vit", "connector_4x", "connector_16x", "language_model")}

# Name: model, stage, layout. The last word "trained": also steps with an evaluation between them.
# Layouts differ in which ranks count: of a label loss one of the tensor-parallel ranks and each
# context rank; of a KL one rank of the last stage; of ViR each rank.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tp2 pretrain": (DENSE, "pretrain", TP2),
    "cp2 pretrain": (DENSE, "pretrain", CP2),
    "pp2 warmup": (DENSE, "warmup", PP2),
    "pp2 router": (DENSE, "router", PP2),
    "dp2 router": (DENSE, "router", {}),
    "tp2 consistency trained": (DENSE, "consistency", TP2 | ALL),
    "cp2 consistency trained": (DENSE, "consistency", CP2 | ALL),
    "dp2 overlap consistency trained": (DENSE, "consistency", OVERLAP),
    "moe ep2 overlap consistency trained": (
        MOE,
        "consistency",
        OVERLAP | {"expert_model_parallel_size": 2},
    ),
}


@pytest.fixture(scope="module")
def configs(
    toy_data: ToyData, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[RunConfig, RunConfig]]:
    """Each case and its one-process twin; four packs a global batch, so that the last one is filled
    up."""
    folder = tmp_path_factory.mktemp("validation")
    valid = make_toy_shards(
        folder, write_conversations(folder, num_samples=NUM_SAMPLES, seed=7), toy_data.tokenizer
    ).shards
    made = {}
    for name, (model, stage, layout) in CASES.items():
        reference = (
            {} if stage == "pretrain" else {"reference_load": str(folder / model / "reference")}
        )
        options: dict[str, Any] = {
            "model_size": model,
            "pretrained_checkpoint": str(folder / model / "policy"),
            "valid_data_path": (str(valid),),
            "global_batch_size": 4,
            "max_samples_per_pack": 2,
            "train_iters": STEPS,
            **reference,
            **(ALL if layout.get("train_modules") else {}),
        }
        cfg = toy_config(toy_data, stage, **options | layout)
        if cfg.parallel.overlap_param_gather:
            cfg = dataclasses.replace(cfg, ddp=BUCKETS)
        made[name] = (cfg, toy_config(toy_data, stage, **options))
    return made


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one process and what each of two ranks finds, by case."""

    truth: dict[str, dict[str, Any]]
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(
    configs: dict[str, tuple[RunConfig, RunConfig]],
    toy_data: ToyData,
    single_process_groups: None,
) -> Found:
    truth = {}
    with started(ParallelOptions(), seed=1, timeout_minutes=1) as groups:
        for model in (DENSE, MOE):
            start = next(
                twin for _, twin in configs.values() if twin.model.model_size == model
            ).checkpoint
            assert start.pretrained_checkpoint is not None
            plain = toy_config(toy_data, "pretrain", model_size=model)
            save_models(Path(start.pretrained_checkpoint).parent, model, plain, groups)
        for name, (cfg, twin) in configs.items():
            validate(cfg, 2)
            truth[name] = found_of(twin, groups, is_trained=name.endswith("trained"))
    cases = {name: cfg for name, (cfg, _) in configs.items()}
    ranks = on_ranks(found_by_ranks, cases, num_ranks=2)
    return Found(truth=truth, ranks=ranks)


@pytest.mark.parametrize("name", list(CASES))
def test_a_layout_finds_what_one_process_finds(name: str, found: Found) -> None:
    """Measured: 2e-7."""
    first, second = (rank[name]["figures"] for rank in found.ranks)
    truth = found.truth[name]["figures"]
    assert first == second
    assert first.keys() == truth.keys()
    assert first["samples"] == truth["samples"]
    assert first["samples"] == NUM_SAMPLES or "router" in name
    for figure, value in first.items():
        assert value == pytest.approx(truth[figure], rel=1e-5), figure


@pytest.mark.parametrize("name", [name for name in CASES if name.endswith("trained")])
def test_training_does_not_notice(name: str, found: Found) -> None:
    """Bit for bit. The weights of each step are those that are validated; measured: 1e-7."""
    for rank in found.ranks:
        assert rank[name]["norms"] == rank[name]["norms without"]
        assert len(set(rank[name]["norms"])) == STEPS
        assert rank[name]["losses"] == pytest.approx(found.truth[name]["losses"], rel=1e-5)
    assert len(set(found.truth[name]["losses"])) == STEPS
