"""Lengths of what a pipeline stage will receive, against the order in which mcore's schedules ask
for them."""

import types
from typing import Any

import pytest
import torch

from megatron_vico.parallel.static_shapes import StaticShapes

LENS = [5, 7, 3, 9, 4, 8]
WIDTH = 16


def communicator(
    monkeypatch: pytest.MonkeyPatch, *, stage: int, stages: int, chunks: int | None = None
) -> StaticShapes:
    group = types.SimpleNamespace(size=lambda: stages, rank=lambda: stage)
    monkeypatch.setattr(torch.distributed, "get_global_rank", lambda group, rank: rank)
    monkeypatch.setattr(StaticShapes, "is_pp_first_stage", property(lambda self: stage == 0))
    monkeypatch.setattr(
        StaticShapes, "is_pp_last_stage", property(lambda self: stage == stages - 1)
    )
    config: Any = types.SimpleNamespace(
        virtual_pipeline_model_parallel_size=chunks,
        hidden_size=WIDTH,
        microbatch_group_size_per_vp_stage=stages,
    )
    return StaticShapes(group, config, LENS)


def received(known: StaticShapes, *, forward: int, backward: int) -> tuple[list[int], list[int]]:
    """Lengths in the order of the receives."""
    ahead = [known._communicate_shapes(None, None, True, False)[0] for _ in range(forward)]
    back = [known._communicate_shapes(None, None, False, True)[1] for _ in range(backward)]
    known.check_finished(forward_only=False)
    return [shape[0] for shape in ahead if shape], [shape[0] for shape in back if shape]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_without_interleaving_packs_come_in_order(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = communicator(monkeypatch, stage=stage, stages=3)
    forward, backward = received(known, forward=6 * (stage > 0), backward=6 * (stage < 2))
    assert forward == (LENS if stage > 0 else [])
    assert backward == (LENS if stage < 2 else [])


def test_interleaved_packs_come_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages, two chunks: packs 0 and 1 through both chunks, then packs 2 and 3, ..."""
    first = communicator(monkeypatch, stage=0, stages=2, chunks=2)
    # The first stage embeds for its first chunk, and receives for its second.
    assert received(first, forward=6, backward=12) == (LENS, [5, 7, 5, 7, 3, 9, 3, 9, 4, 8, 4, 8])
    last = communicator(monkeypatch, stage=1, stages=2, chunks=2)
    assert received(last, forward=12, backward=6) == ([5, 7, 5, 7, 3, 9, 3, 9, 4, 8, 4, 8], LENS)


def test_shapes_are_those_of_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    known = communicator(monkeypatch, stage=1, stages=3)
    assert known._communicate_shapes(None, None, True, True) == ((5, 1, WIDTH), (5, 1, WIDTH))


def test_what_was_never_received_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    known = communicator(monkeypatch, stage=1, stages=2)
    with pytest.raises(AssertionError, match="6 foreseen hidden states"):
        known.check_finished(forward_only=True)
