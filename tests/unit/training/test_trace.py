"""A step's trace: which spans a stage leaves, in which order, and a file that trace viewers
open."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vico.training.trace import StepTrace, phase, trace_file
from megatron_vico.training.trainer import train
from tests.training_runs import ToyData, toy_config

PACKS = 2
REFERENCE = [("reference", "forward", index) for index in range(PACKS)]
TRAINED = [
    ("policy", kind, index)
    for index, kind in itertools.product(range(PACKS), ("forward", "loss", "backward"))
]
ENCODED = [("encode", "phase", None)] * 2 + [("deliver tokens", "phase", None)]
AGAIN = ENCODED[1:]  # a second plan on the same features
BACK = [("return gradients", "phase", None), ("encoder backward", "phase", None)]
SPANS = {
    "pretrain": ENCODED + TRAINED + BACK,
    "warmup": ENCODED + AGAIN + REFERENCE + TRAINED + BACK,
    "consistency": ENCODED + AGAIN + REFERENCE + TRAINED + BACK,
    "router": (
        ENCODED
        + 2 * AGAIN
        + REFERENCE
        + [
            (f"policy ({plan})", "forward", index)
            for plan, index in itertools.product(("none", "one"), range(PACKS))
        ]
    ),
}


def events_of(path: Path) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


@pytest.mark.parametrize("stage", SPANS)
def test_a_stage_leaves_the_trace_of_the_step_asked_for(
    stage: str, toy_data: ToyData, base_checkpoint: Path, tmp_path: Path
) -> None:
    source = {} if stage == "pretrain" else {"pretrained_checkpoint": str(base_checkpoint)}
    source |= {"reference_load": str(base_checkpoint)} if stage == "router" else {}
    train(toy_config(toy_data, stage, train_iters=2, trace_step=2, save=str(tmp_path), **source))
    assert [path.name for path in (tmp_path / "trace").iterdir()] == ["step_0000002"]
    events = events_of(trace_file(str(tmp_path), 2, 0))
    found = [
        (event["args"]["model"], event["args"]["kind"], event["args"]["microbatch"])
        for event in events
    ]
    assert found == [*SPANS[stage], ("optimizer", "phase", None)]
    for before, after in itertools.pairwise(events):  # one process does one thing at a time
        assert before["dur"] > 0
        assert (
            before["ts"] + before["dur"] <= after["ts"] + 1.0
        )  # us: rounding of seconds since 1970 is 0.25


def test_a_backward_pass_is_recorded_whenever_it_comes() -> None:
    trace = StepTrace()
    weight = torch.ones(3, requires_grad=True)
    outputs = []
    for index in range(2):
        with trace.span("policy", "forward", index, 0) as span:
            outputs.append(weight * index)
        trace.await_backward(span, outputs[-1])
    assert [span.kind for span in trace.spans] == ["forward", "forward"]
    for output in reversed(outputs):
        output.sum().backward()
    assert [(span.kind, span.microbatch) for span in trace.spans[2:]] == [
        ("backward", 1),
        ("backward", 0),
    ]
    assert all(span.end >= span.start for span in trace.spans)


def test_nothing_is_awaited_where_no_backward_pass_comes() -> None:
    trace = StepTrace()
    weight = torch.ones(3, requires_grad=True)
    with torch.no_grad(), trace.span("reference", "forward", 0, 0) as span:
        output = weight * 2
    trace.await_backward(span, output)
    assert len(trace.spans) == 1


def test_a_file_that_trace_viewers_open(tmp_path: Path) -> None:
    trace = StepTrace()
    with trace.span("policy", "forward", 3, 1):
        pass
    with phase(trace, "optimizer"), phase(None, "nothing"):
        pass
    path = trace_file(str(tmp_path), 5, 12)
    assert path == tmp_path / "trace" / "step_0000005" / "rank_0012.json"
    trace.write(path, rank=12)
    first, second = events_of(path)
    assert (first["name"], first["ph"], first["pid"], first["cat"]) == (
        "policy forward 3",
        "X",
        12,
        "policy,forward",
    )
    assert first["args"] == {
        "model": "policy",
        "kind": "forward",
        "microbatch": 3,
        "chunk": 1,
        "rank": 12,
    }
    assert second["name"] == "optimizer phase"
    assert second["ts"] >= first["ts"] + first["dur"] - 1.0
