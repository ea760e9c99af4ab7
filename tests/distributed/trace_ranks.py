"""Runs one consistency step a case under a recorder, with ranks that wait for each other."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_vico.config.schema import RunConfig
from megatron_vico.parallel.groups import Groups
from megatron_vico.parallel.static_shapes import P2PCommunicator, StaticShapes
from megatron_vico.training import consistency_step, pipeline_schedule, reference
from megatron_vico.training.setup import set_up
from megatron_vico.training.trainer import compute_gradients, update_weights
from tests.distributed.cached_layouts import CachedLayouts
from tests.distributed.recorder import RankRecord, Recorder, Span

RECORDER = Recorder()

Fault = Literal["none", "barrier", "shape exchange"]
"""What is put wrong on purpose: a barrier between the passes, or megatron-core's own
communicator."""


@dataclass(kw_only=True)
class Handshake:
    """Stands for `record_function`: the end of the reference waits for the beginning of the policy.

    The last stage does not run its last reference forward pass before the first stage is about to
    run its first policy forward pass. With anything between the passes that waits for all ranks,
    that never happens.
    """

    groups: Groups
    store: torch.distributed.Store
    case: str
    last: str
    """Name of the last stage's last reference forward pass."""

    wait_s: float
    met: bool = True
    spans: list[Span] = field(default_factory=list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Note when a named range of the step begins and ends."""
        span = Span(name=name, start=time.time())
        self.spans.append(span)
        key = f"{self.case}, replica {self.groups.dp_rank}"
        begins = name.startswith("policy forward") and self.groups.language.pp.rank() == 0
        if begins and not any(each.name.startswith("policy") for each in self.spans[:-1]):
            self.store.set(key, b"begun")
        if name == self.last and self.groups.is_last_stage:
            try:
                self.store.wait([key], timedelta(seconds=self.wait_s))
            except RuntimeError:  # out of time; the step goes on, so that the other ranks end too
                self.met = False
        yield
        span.end = time.time()


class AskingShapes(StaticShapes):
    """megatron-core's communicator: it sends each shape ahead."""

    _communicate_shapes = P2PCommunicator._communicate_shapes

    def check_finished(self, *, forward_only: bool) -> None:
        """Nothing was foreseen."""


@dataclass(kw_only=True)
class Launch:
    """What the cases share."""

    store: torch.distributed.Store
    layouts: CachedLayouts
    shape_exchanges: int = 0

    def count_shape_exchanges(self) -> None:
        """Count the calls of megatron-core's shape exchange."""
        exchange = P2PCommunicator._communicate_shapes

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.shape_exchanges += 1
            return exchange(*args, **kwargs)

        P2PCommunicator._communicate_shapes = AskingShapes._communicate_shapes = counted

    def record(self, name: str, cfg: RunConfig, fault: Fault, wait_s: float) -> RankRecord:
        """One step unrecorded, for what only a first step does, and one recorded."""
        groups = self.layouts.switch_to(cfg.parallel)
        run = set_up(cfg, groups)
        run.policy.train_mode()
        batches = iter(run.batches())
        compute_gradients(run, next(batches))
        update_weights(run)
        batch = next(batches)
        last_chunk = len(run.policy.language_chunks) - 1
        handshake = Handshake(
            groups=groups,
            store=self.store,
            case=name,
            last=f"reference forward pack {len(batch.packs) - 1} chunk {last_chunk}",
            wait_s=wait_s,
        )
        RECORDER.events.clear()
        self.shape_exchanges = 0
        with _watched(fault, handshake), RECORDER.watching():
            compute_gradients(run, batch)
        return RankRecord(
            is_first_stage=groups.language.pp.rank() == 0,
            is_last_stage=groups.is_last_stage,
            met=handshake.met,
            spans=tuple(handshake.spans),
            events=tuple(RECORDER.events),
            shape_exchanges=self.shape_exchanges,
        )


@contextmanager
def _watched(fault: Fault, handshake: Handshake) -> Iterator[None]:
    """Tell the recorder which phase runs, and put the fault in."""
    forward_pass, training_pass, communicator = (
        reference.forward_pass,
        consistency_step.training_pass,
        pipeline_schedule.StaticShapes,
    )

    @functools.wraps(training_pass)
    def after_barrier(*args: Any) -> Any:
        torch.distributed.barrier()
        return _phased(training_pass, "policy", then="after")(*args)

    reference.forward_pass = _phased(forward_pass, "reference", then="between")
    consistency_step.training_pass = (
        after_barrier if fault == "barrier" else _phased(training_pass, "policy", then="after")
    )
    pipeline_schedule.StaticShapes = AskingShapes if fault == "shape exchange" else communicator
    record_function, pipeline_schedule.record_function = (
        pipeline_schedule.record_function,
        handshake,
    )
    RECORDER.phase = "before"
    try:
        yield
    finally:
        RECORDER.phase = ""
        reference.forward_pass, consistency_step.training_pass = forward_pass, training_pass
        pipeline_schedule.StaticShapes = communicator
        pipeline_schedule.record_function = record_function


def _phased(function: Callable[..., Any], phase: str, *, then: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        with RECORDER.during(phase, then=then):
            return function(*args)

    return wrapped


def records_of(
    cases: Mapping[str, tuple[RunConfig, Fault, float]], folder: Path
) -> dict[str, RankRecord]:
    """What this rank does in each case: a run, what is put wrong, seconds that a rank waits."""
    store = torch.distributed.FileStore(str(folder / "store"), torch.distributed.get_world_size())
    launch = Launch(store=store, layouts=CachedLayouts())
    launch.count_shape_exchanges()
    return {name: launch.record(name, *case) for name, case in cases.items()}
