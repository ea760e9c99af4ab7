"""--profile: which parts of a step it names in each stage, in which order, and which steps it
records."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vico.config.schema import RunConfig
from megatron_vico.evaluation.plots import read_trace
from megatron_vico.parallel.groups import started
from megatron_vico.training.profiler import name_backward, open_profiler, trace_folder
from megatron_vico.training.trainer import train
from tests.training_runs import ToyData, read_metrics, toy_config, untimed

PACKS = 2
REFERENCE = [("reference", "forward", index) for index in range(PACKS)]
TRAINED = [
    ("policy", kind, index)
    for index, kind in itertools.product(range(PACKS), ("forward", "loss", "backward"))
]
FEATURES = [("encode", "phase", None)]  # of a ViT that runs once for all plans
# A plan's tokens: the packs' tiles are more than one chunk, of which each goes on its way at once.
PLAN = 2 * [("encode", "phase", None), ("deliver tokens", "phase", None)]
BACK = 2 * [("return gradients", "phase", None), ("encoder backward", "phase", None)]
SPANS = {
    "pretrain": PLAN + TRAINED + BACK,
    "warmup": FEATURES + 2 * PLAN + REFERENCE + TRAINED + BACK,
    "consistency": FEATURES + 2 * PLAN + REFERENCE + TRAINED + BACK,
    "router": (
        FEATURES
        + 3 * PLAN
        + REFERENCE
        + [
            (f"policy ({plan})", "forward", index)
            for plan, index in itertools.product(("none", "one"), range(PACKS))
        ]
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", SPANS)
def test_a_profile_names_the_parts_of_its_last_step_and_changes_nothing(
    stage: str,
    stage_config: Callable[..., RunConfig],
    plain_run: Callable[[str], tuple[Path, dict[str, Any]]],
    tmp_path: Path,
) -> None:
    steps = {"profile": True, "profile_step_start": 1, "profile_step_end": 2}
    plain, options = plain_run(stage)
    train(stage_config(stage, **options, save=str(tmp_path), **steps))
    found, expected = (list(map(untimed, read_metrics(each))) for each in (tmp_path, plain))
    assert found == expected
    assert not (plain / "trace").exists()
    folder = trace_folder(str(tmp_path), 2)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    boxes = read_trace(folder)
    found = [(box.model, box.kind, box.pack) for box in boxes]
    ends = [(name, "phase", None) for name in ("read ahead", "optimizer")]
    assert found == [*SPANS[stage], *ends]
    for before, after in itertools.pairwise(boxes):  # one process does one thing at a time
        assert before.start_ms < before.end_ms <= after.start_ms + 0.001


@pytest.mark.parametrize(
    ("ranks", "resume_at", "records"), [((), 1, True), ((1,), 1, False), ((0,), 3, False)]
)
def test_other_ranks_and_runs_past_the_steps_record_nothing(
    ranks: tuple[int, ...],
    resume_at: int,
    records: bool,
    toy_data: ToyData,
    single_process_groups: None,
) -> None:
    steps = {"profile": True, "profile_step_start": 2, "profile_step_end": 3}
    cfg = toy_config(toy_data, "pretrain", save="unused", profile_ranks=ranks, **steps)
    with started(cfg.parallel, seed=1, timeout_minutes=1):
        profiling = open_profiler(cfg, resume_at=resume_at)
    assert isinstance(profiling, torch.profiler.profile) == records


def test_a_backward_pass_is_named_whenever_it_comes(tmp_path: Path) -> None:
    """As in 1F1B and the interleaved schedule: not in the order of the forward passes."""
    weight = torch.ones(3, requires_grad=True)
    with torch.profiler.profile() as profiler:
        outputs = [weight * index for index in range(2)]
        for index, output in enumerate(outputs):
            name_backward(f"policy backward pack {index} chunk 0", output)
        with torch.no_grad():  # no backward pass will come
            name_backward("reference backward pack 0 chunk 0", weight * 2)
        for output in reversed(outputs):
            output.sum().backward()
    profiler.export_chrome_trace(str(tmp_path / "rank_0000.json"))
    first, second = read_trace(tmp_path)
    assert (first.pack, second.pack) == (1, 0)
    assert first.end_ms <= second.start_ms
    # What autograd did lies within.
    events = json.loads((tmp_path / "rank_0000.json").read_text())["traceEvents"]
    spans = [event for event in events if event.get("cat") == "user_annotation"]
    inner = [event for event in events if event["name"] == "MulBackward0"]
    assert len(inner) == 2
    assert all(
        any(
            span["ts"] <= event["ts"] and event["ts"] + event["dur"] <= span["ts"] + span["dur"]
            for span in spans
        )
        for event in inner
    )


def test_without_a_profiler_nothing_is_hooked() -> None:
    output = torch.ones(3, requires_grad=True) * 2
    name_backward("policy backward pack 0 chunk 0", output)
    assert not output._backward_hooks
