"""Runs one consistency step a case under a recorder, with ranks that wait for each other; started
by torchrun.

Usage: trace_ranks.py FOLDER, with FOLDER/cases.pkl, a dict from name to (RunConfig, what is put
wrong, seconds that a rank waits). Each rank writes FOLDER/NAME/RANK.pkl, a `RankRecord` of
tests/distributed/recorder.py.
"""

import functools
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from megatron_vico import cpu_stand_in
from tests.distributed.recorder import RankRecord, Recorder

RECORDER = Recorder()
if __name__ == "__main__":
    RECORDER.watch_ranks()
    cpu_stand_in.install()
    RECORDER.watch_host()

import torch  # noqa: E402

from megatron_vico.config.schema import RunConfig  # noqa: E402
from megatron_vico.parallel.groups import Groups  # noqa: E402
from megatron_vico.parallel.static_shapes import KnownShapes, P2PCommunicator  # noqa: E402
from megatron_vico.training import (  # noqa: E402
    consistency_step,
    pipeline_schedule,
    reference,
)
from megatron_vico.training.setup import set_up  # noqa: E402
from megatron_vico.training.trace import Kind, Span, StepTrace  # noqa: E402
from megatron_vico.training.trainer import compute_gradients, update_weights  # noqa: E402
from tests.distributed.cached_layouts import CachedLayouts  # noqa: E402

Fault = Literal["none", "barrier", "shape exchange"]
"""What is put wrong on purpose: a barrier between the passes, or megatron-core's own
communicator."""


@dataclass(kw_only=True)
class HandshakeTrace(StepTrace):
    """A trace in which the end of the reference waits for the beginning of the policy.

    The last stage does not run its last reference forward pass before the first stage is about to
    run its first policy forward pass. With anything between the passes that waits for all ranks,
    that never happens.
    """

    groups: Groups
    store: torch.distributed.Store
    case: str
    last: tuple[int, int]
    """Microbatch and chunk of the last stage's last reference forward pass."""

    wait_s: float
    met: bool = True
    _begun: bool = field(default=False)

    @contextmanager
    def span(
        self, name: str, kind: Kind, microbatch: int | None = None, chunk: int | None = None
    ) -> Iterator[Span]:
        """As in the base class, but for the handshake."""
        with super().span(name, kind, microbatch, chunk) as span:
            key = f"{self.case}, replica {self.groups.dp_rank}"
            if (
                name == "policy"
                and kind == "forward"
                and self.groups.is_first_stage
                and not self._begun
            ):
                self._begun = True
                self.store.set(key, b"begun")
            if (
                name == "reference"
                and self.groups.is_last_stage
                and (microbatch, chunk) == self.last
            ):
                try:
                    self.store.wait([key], timedelta(seconds=self.wait_s))
                except (
                    RuntimeError
                ):  # out of time; the step goes on, so that the other ranks end too
                    self.met = False
            yield span


class AskingShapes(KnownShapes):
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
        trace = HandshakeTrace(
            groups=groups,
            store=self.store,
            case=name,
            last=(len(batch.packs) - 1, len(run.policy.language_chunks) - 1),
            wait_s=wait_s,
        )
        RECORDER.events.clear()
        self.shape_exchanges = 0
        with _watched(fault):
            compute_gradients(run, batch, trace=trace)
        return RankRecord(
            is_first_stage=groups.is_first_stage,
            is_last_stage=groups.is_last_stage,
            met=trace.met,
            spans=tuple(trace.spans),
            events=tuple(RECORDER.events),
            shape_exchanges=self.shape_exchanges,
        )


@contextmanager
def _watched(fault: Fault) -> Iterator[None]:
    """Tell the recorder which phase runs, and put the fault in."""
    forward_pass, training_pass, communicator = (
        reference.forward_pass,
        consistency_step.training_pass,
        pipeline_schedule.KnownShapes,
    )

    @functools.wraps(training_pass)
    def after_barrier(*args: Any) -> Any:
        torch.distributed.barrier()
        return _phased(training_pass, "policy", then="after")(*args)

    reference.forward_pass = _phased(forward_pass, "reference", then="between")
    consistency_step.training_pass = (
        after_barrier if fault == "barrier" else _phased(training_pass, "policy", then="after")
    )
    pipeline_schedule.KnownShapes = AskingShapes if fault == "shape exchange" else communicator
    RECORDER.phase = "before"
    try:
        yield
    finally:
        RECORDER.phase = ""
        reference.forward_pass, consistency_step.training_pass = forward_pass, training_pass
        pipeline_schedule.KnownShapes = communicator


def _phased(function: Callable[..., Any], phase: str, *, then: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        with RECORDER.during(phase, then=then):
            return function(*args)

    return wrapped


def main() -> None:
    """Run all cases."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    store = torch.distributed.FileStore(str(folder / "store"), torch.distributed.get_world_size())
    launch = Launch(store=store, layouts=CachedLayouts())
    launch.count_shape_exchanges()
    for name, (cfg, fault, wait_s) in pickle.loads((folder / "cases.pkl").read_bytes()).items():
        record = launch.record(name, cfg, fault, wait_s)
        (folder / name).mkdir(exist_ok=True)
        (folder / name / f"{rank}.pkl").write_bytes(pickle.dumps(record))
    torch.distributed.barrier()
    os._exit(0)  # a dozen process groups take a while to close


if __name__ == "__main__":
    main()
