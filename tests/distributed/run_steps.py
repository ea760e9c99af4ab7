"""Runs cases under their layouts and compares each with its one-process twin, which is kept in
FOLDER/TRUTH/STEP.pt.
"""

import contextlib
import functools
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_vico.config.schema import ParallelOptions
from megatron_vico.errors import SampleError
from megatron_vico.models import attention, language_model
from megatron_vico.parallel.batch import share_step
from megatron_vico.parallel.groups import Groups
from tests.distributed.cached_layouts import CachedLayouts
from tests.distributed.global_weights import Part
from tests.distributed.step_records import STEPS, Case, record

FIGURES = (
    "loss",
    "grad_norm",
    "router_threshold",
    "router_accuracy",
    "samples",
    "tiles",
    "response_tokens",
)


def write_truth(case: Case, groups: Groups, folder: Path) -> None:
    """Run a case in one process and keep all of it."""
    folder.mkdir(parents=True)
    for number, step in enumerate(record(case, groups)):
        assert number or 0 in step.num_tiles, "no pack without an image"
        names = [part.name for part in step.parts]
        whole = {
            "figures": {name: getattr(step.figures, name) for name in FIGURES},
            "grads": dict(zip(names, _real(step.parts, step.grads), strict=True)),
            "params": dict(zip(names, _real(step.parts, step.params), strict=True)),
        }
        torch.save(whole, folder / f"{number}.pt")


def compare(case: Case, groups: Groups, folder: Path) -> list[dict[str, Any]]:
    """Largest relative errors of each step over all ranks, with the names of the tensors."""
    steps = []
    with _broken(case.broken) if case.broken else contextlib.nullcontext():
        for number, step in enumerate(record(case, groups)):
            truth = torch.load(folder / case.truth / f"{number}.pt", mmap=True)
            errors: dict[str, Any] = {
                name: _relative(getattr(step.figures, name), truth["figures"][name])
                for name in FIGURES
            }
            for kind, values in (("grads", step.grads), ("params", step.params)):
                expected = [truth[kind][part.name] for part in step.parts]
                missing = [each is None for each in values] != [each is None for each in expected]
                assert not missing or (kind == "params" and None in values), (
                    f"other {kind} than of one process"
                )
                found = zip(map(_error, step.parts, values, expected), step.parts, strict=True)
                errors[kind] = max((error, part.name) for error, part in found)
            steps.append(errors)
    assert len(steps) == STEPS
    all_ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(all_ranks, steps)
    return [
        {key: max(rank[number][key] for rank in all_ranks) for key in steps[0]}
        for number in range(STEPS)
    ]


def told_of_a_broken_sample(groups: Groups) -> list[str]:
    """What each rank raises when the reader of its replica meets a sample it cannot read."""
    reads = groups.replica.rank() == 0
    told: list[Any] = [None] * torch.distributed.get_world_size()
    try:
        share_step(
            SampleError(f"sample 'broken' of replica {groups.dp_rank}") if reads else None,
            groups=groups,
        )
    except SampleError as error:
        torch.distributed.all_gather_object(told, str(error))
    return told


def _real(parts: Sequence[Part], values: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Without the padding of a vocabulary."""
    return [
        None if value is None else value[: part.num_rows].clone()
        for part, value in zip(parts, values, strict=True)
    ]


def _error(part: Part, value: Tensor | None, truth: Tensor | None) -> float:
    """Norm of the difference over that of the whole tensor: a part may be small by chance."""
    if value is None or truth is None:
        return 0.0
    expected = part.cut(truth)
    if float(truth.norm()) == 0.0:
        return float(value.norm())
    if part.num_rows is not None:
        # Padding is nobody's.
        rows = min(max(part.num_rows - part.index * len(value), 0), len(value))
        value, expected = value[:rows], expected[:rows]
    assert torch.isfinite(value).all(), part.name
    return float((value.double() - expected.double()).norm() / truth.double().norm())


def _relative(value: float | None, truth: float | None) -> float:
    if value is None or truth is None:
        assert value is truth
        return 0.0
    return abs(value - truth) / max(abs(truth), 1e-12)


def _broken(what: str) -> AbstractContextManager[Any]:
    """The model without a sum of gradients: over tensor-parallel ranks that of its response rows,
    or over context ranks what their queries owe to this rank's keys."""
    own_alone = functools.partial(
        attention.gather_from_sequence_parallel_region, tensor_parallel_output_grad=False
    )
    owner, name, wrong = {
        "rows": (language_model, "copy_to_tensor_model_parallel_region", lambda rows, group: rows),
        "keys": (attention, "gather_from_sequence_parallel_region", own_alone),
    }[what]
    return mock.patch.object(owner, name, wrong)


def found_by_ranks(cases: Sequence[Case], folder: Path) -> dict[str, Any]:
    """The errors of each case, with one set of process groups a layout; called by every rank."""
    layouts = CachedLayouts()
    found: dict[str, Any] = {}
    for case in cases:
        started = time.process_time()
        found[case.name] = compare(case, layouts.switch_to(case.cfg.parallel), folder)
        if torch.distributed.get_rank() == 0:
            print(f"{case.name}: {time.process_time() - started:.1f} s, {found[case.name][-1]}")
    pipeline = layouts.switch_to(ParallelOptions(pipeline_model_parallel_size=2))
    return found | {f"told-{torch.distributed.get_world_size()}": told_of_a_broken_sample(pipeline)}
