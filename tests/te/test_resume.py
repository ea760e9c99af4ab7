"""A run goes on between a CPU and TransformerEngine, and with each form of Adam's state."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from megatron.core import optimizer
from megatron.core.optimizer import distrib_optimizer

from megatron_vico.cpu_stand_in import CPUAdam
from megatron_vico.training.trainer import train
from tests.training_runs import ToyData, read_metrics, toy_config

Side = Literal["cpu", "engine"]
STEPS = 4


class Runs:
    """Toy runs in one folder, part by part."""

    def __init__(self, data: ToyData, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.data, self.folder, self.patch = data, folder, patch

    def losses(
        self, *parts: Side, formats: Sequence[dict[str, Any]] = (), **options: Any
    ) -> list[float]:
        """Of a run of STEPS whose parts each run on one side and resume the one before.

        `formats` are the options of each part that no other has.
        """
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        for side, own in zip(parts, formats or [{}] * len(parts), strict=True):
            cfg = toy_config(
                self.data,
                "pretrain",
                train_iters=STEPS,
                save=str(folder),
                load=str(folder),
                exit_interval=STEPS // len(parts),
                **options,
                **own,
            )
            with self.patch.context() as patch:
                if side == "cpu":
                    patch.setattr(optimizer, "Adam", CPUAdam)
                    patch.setattr(distrib_optimizer, "Adam", CPUAdam)
                attention = "sdpa" if side == "cpu" else "auto"
                model = dataclasses.replace(cfg.model, attention=attention)
                train(dataclasses.replace(cfg, model=model))
        found = [row["loss"] for row in read_metrics(folder)]
        assert len(found) == STEPS
        return found


@pytest.fixture
def runs(toy_data: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(toy_data, tmp_path, monkeypatch)


@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "distributed"])
def test_a_run_goes_from_a_cpu_to_transformer_engine_and_back(
    distributed: bool, runs: Runs, single_process_groups: None
) -> None:
    """TransformerEngine's Adam asks each parameter group for more than a CPU's saves."""
    options = {"use_distributed_optimizer": distributed}
    expected = runs.losses("cpu", **options)
    for parts in (("cpu", "engine"), ("engine", "cpu")):
        assert runs.losses(*parts, **options) == pytest.approx(expected, rel=1e-5)  # measured 2e-7


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_a_precision_aware_optimizer_resumes(
    moments: Literal["fp32", "bf16"], runs: Runs, single_process_groups: None
) -> None:
    options: dict[str, Any] = {
        "bf16": True,
        "use_distributed_optimizer": True,
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": moments,
        "exp_avg_sq_dtype": moments,
    }
    assert runs.losses("engine", "engine", **options) == runs.losses("engine", **options)


def test_weight_gradients_are_fused_in_transformer_engines_layers(
    runs: Runs, single_process_groups: None
) -> None:
    """Although the head, a layer of megatron-core's own, could not without apex."""
    fused = runs.losses("engine", gradient_accumulation_fusion=True)
    assert fused == pytest.approx(runs.losses("engine", "engine"), rel=1e-5)


def test_a_run_goes_from_fp8_to_bf16_and_back(runs: Runs, single_process_groups: None) -> None:
    """With weights that are kept in FP8 and such that are not; in FP8 alone bit for bit."""
    common: dict[str, Any] = {"bf16": True, "use_distributed_optimizer": True}
    fp8: dict[str, Any] = {"fp8_format": "hybrid"}
    kept = fp8 | {"fp8_param_gather": True}
    whole = runs.losses("engine", **common, **kept)
    assert runs.losses("engine", "engine", **common, **kept) == whole
    parts: list[Side] = ["engine"] * 4
    mixed = runs.losses(*parts, formats=(kept, {}, fp8, kept), **common)
    assert mixed == pytest.approx(whole, rel=0.005)  # measured 6e-4
    assert mixed != whole
