"""Training checkpoints that are saved under one layout and resumed under another, on the four ranks
of a launch."""

import errno
import zlib
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import Tensor

from megatron_vico.checkpoint import run_folder, training_checkpoint
from megatron_vico.config.registry import ModelConfig, get_model_config
from megatron_vico.config.schema import ParallelOptions
from megatron_vico.convert.megatron.reader import DcpFolder, open_dcp
from megatron_vico.errors import CheckpointError
from megatron_vico.parallel.groups import Groups
from tests.checkpoint_runs import Training, make_training
from tests.distributed.cached_layouts import CachedLayouts
from tests.distributed.global_weights import gather_weights, parts_of

LAYOUTS = {
    "dp4": ParallelOptions(),
    "tp2": ParallelOptions(tensor_model_parallel_size=2),
    "tp2-sp": ParallelOptions(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2": ParallelOptions(pipeline_model_parallel_size=2),
    "pp2-vpp2": ParallelOptions(
        pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1
    ),
    "tp2-pp2": ParallelOptions(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "cp2": ParallelOptions(context_parallel_size=2),
    "ep2": ParallelOptions(expert_model_parallel_size=2),
    "ep2-tp2": ParallelOptions(
        expert_model_parallel_size=2, tensor_model_parallel_size=2, sequence_parallel=True
    ),
    "ep2-tp2-etp1": ParallelOptions(
        expert_model_parallel_size=2,
        tensor_model_parallel_size=2,
        expert_tensor_parallel_size=1,
        sequence_parallel=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint, and the layouts that resume it."""

    model: str
    dtype: str
    optimizer: str
    saved_under: str
    loaded_under: tuple[str, ...]

    @property
    def name(self) -> str:
        return "-".join((self.model, self.dtype, self.optimizer, self.saved_under))


def _case(name: str, *loaded_under: str) -> Case:
    model, dtype, optimizer, saved_under = name.split(" ")
    return Case(
        model=model,
        dtype=dtype,
        optimizer=optimizer,
        saved_under=saved_under,
        loaded_under=loaded_under,
    )


# Dense: every cut saved and loaded, with each optimizer and number format. Experts: from ranks for
# them to none and back, which megatron-core's own format cannot do. Once each from its own layout.
CASES = (
    _case("toy-6b fp32 sharded tp2-pp2", "dp4", "pp2-vpp2"),
    _case("toy-6b bf16 sharded pp2-vpp2", "pp2-vpp2", "tp2"),
    _case("toy-6b fp32 replicated tp2-sp", "cp2"),
    _case("toy-6b bf16 replicated cp2", "pp2"),
    _case("toy-moe fp32 sharded ep2-tp2", "ep2-tp2", "pp2", "ep2-tp2-etp1"),
    _case("toy-moe bf16 sharded dp4", "ep2"),
    _case("toy-moe fp32 replicated dp4", "ep2-tp2"),
)


def model_of(name: str) -> ModelConfig:
    """A toy of four layers; its vocabulary is padded to 384 rows on one tensor-parallel rank, to
    512 on two."""
    model = get_model_config(name)
    return replace(model, language=replace(model.language, num_layers=4, vocab_size=300))


class Runner:
    """Runs the cases one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.layouts = CachedLayouts()
        self.third_steps: dict[str, dict[str, Tensor]] = {}

    def make(self, case: Case, layout: str, *, seed: int) -> tuple[Training, Groups]:
        """A training that has not begun."""
        groups = self.layouts.switch_to(LAYOUTS[layout])
        training = make_training(
            model_of(case.model),
            groups=groups,
            seed=seed,
            dtype=case.dtype,
            optimizer=case.optimizer,
            parallel=LAYOUTS[layout],
            clip_grad=0.0,
        )
        return training, groups

    def run(self, case: Case) -> dict[str, dict[str, float]]:
        """How far the third step is from the uninterrupted run's, by layout that resumed after the
        second."""
        one, groups = self.make(case, case.saved_under, seed=1)
        for number in (1, 2):
            step(one, groups, number)
        saved = one.save(self.folder / case.name, 2, {"iteration": 2})
        stored = read_difference(open_dcp(saved), gather_weights(one.modules, groups))
        norm = step(one, groups, 3)
        whole = self.third_steps[case.name] = gather_weights(one.modules, groups)
        found = {"read without a layout": {"weights": stored}}
        for layout in case.loaded_under:
            other, groups = self.make(case, layout, seed=2)
            assert other.load(self.folder / case.name) == {"iteration": 2}
            other_norm = step(other, groups, 3)
            found[layout] = {
                "weights": difference(whole, gather_weights(other.modules, groups)),
                "norm": abs(other_norm / norm - 1),
            }
        return found

    def run_without_optimizer(self, case: Case, layout: str) -> dict[str, float]:
        """As `run` for one layout, from the checkpoint it left: how far weights alone, without
        moments, lead off."""
        results = []
        for load_moments in (True, False):
            training, groups = self.make(case, layout, seed=2)
            if load_moments:
                training.load(self.folder / case.name)
            else:
                training_checkpoint.load_weights(
                    self.folder / case.name, modules=training.modules, model_size=case.model
                )
            before = gather_weights(training.modules, groups)
            step(training, groups, 3)
            results.append((before, gather_weights(training.modules, groups)))
        (loaded, stepped), (weights, differently) = results
        return {"before": difference(loaded, weights), "after": difference(stepped, differently)}

    def refusals(self, case: Case, layout: str) -> dict[str, str]:
        """What this rank is told when a case's checkpoint, read under a layout, does not fit the
        run."""
        language = replace(model_of(case.model).language, num_layers=8)
        models = {
            "another size": (model_of("toy"), case.optimizer),
            "more layers": (replace(model_of(case.model), language=language), case.optimizer),
            "another optimizer": (model_of(case.model), "replicated"),
        }
        told = {}
        for name, (model, optimizer) in models.items():
            groups = self.layouts.switch_to(LAYOUTS[layout])
            other = make_training(
                model, groups=groups, seed=2, optimizer=optimizer, parallel=LAYOUTS[layout]
            )
            try:
                other.load(self.folder / case.name)
            except CheckpointError as error:
                told[name] = str(error)
        return told

    def save_on_a_full_disk(self, case: Case) -> dict[str, Any]:
        """What this rank is told when rank 0's disk is full, for the tensors and then for the
        pointer file; and what is left."""
        one, groups = self.make(case, case.saved_under, seed=1)
        folder = self.folder / "full"
        step(one, groups, 1)
        one.save(folder, 1)
        full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
        told = []
        for module, name in ((filesystem_async, "_write_item"), (run_folder, "write_text")):
            with mock.patch.object(module, name, full if groups.is_main else getattr(module, name)):
                try:
                    one.save(folder, 2)
                except CheckpointError as error:
                    told.append(str(error))
        latest = run_folder.latest_iteration(folder)
        one.load(folder)
        left = sorted(path.name for path in folder.iterdir())
        return {"told": told, "latest": latest, "left": left}


def run_cases(folder: Path) -> dict[str, Any]:
    """What this rank finds, by name of the case; what is refused and the negative control too."""
    runner = Runner(folder)
    found: dict[str, Any] = {case.name: runner.run(case) for case in CASES}
    found["without optimizer"] = runner.run_without_optimizer(CASES[0], "dp4")
    found["refusals"] = runner.refusals(CASES[0], "pp2")
    found["full disk"] = runner.save_on_a_full_disk(CASES[0])
    found["third steps"] = runner.third_steps
    return found


def step(training: Training, groups: Groups, number: int) -> float:
    """One optimizer step whose gradients do not depend on the layout; returns their norm."""
    for module in training.wrapped:
        module.zero_grad_buffer()
    training.optimizer.zero_grad()
    for part in parts_of(training.modules, groups):
        if not part.param.requires_grad:  # the router's dead submodules
            continue
        # crc32: Python's own hash of a string differs from process to process.
        generator = torch.Generator().manual_seed(1000 * zlib.crc32(part.name.encode()) + number)
        whole = torch.randn(part.shape, generator=generator)
        part.param.main_grad.copy_(part.cut(whole)).mul_(part.is_first)
    for module in training.wrapped:
        module.finish_grad_sync()
    _, norm, _ = training.optimizer.step()
    training.scheduler.step(increment=1)
    return float(norm)


def read_difference(folder: DcpFolder, whole: dict[str, Tensor]) -> float:
    """As `difference`, between weights and what a step's folder holds of them, read one by one."""
    stored = [name for name in folder.tensors if not name.startswith("optimizer.")]
    whole = {_on_disk(name, stored): tensor for name, tensor in whole.items()}
    return difference(
        whole, {name: folder.read_tensor(name)[: len(whole[name])] for name in stored}
    )


def _on_disk(name: str, stored: Collection[str]) -> str:
    """A weight's name in a checkpoint, where a norm may be part of the linear layer behind it."""
    for own, on_disk in (
        ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
        ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
        (".local_experts.", ".experts."),
    ):
        if name.replace(own, on_disk) in stored:
            name = name.replace(own, on_disk)
    return name


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest, in units of the largest weight of its tensor; 0 if all bits agree."""
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    return max(
        ((other[name] - whole).abs().max() / whole.abs().max().clamp(min=1e-3)).item()
        for name, whole in one.items()
    )
