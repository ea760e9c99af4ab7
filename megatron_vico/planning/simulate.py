"""How long a step's passes take on a pipeline: megatron-core's schedules, run event by event.

The reference pass runs first, and nothing stands between it and the policy pass, so that the first
stages begin with the policy while the last ones still finish the reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import batched, chain


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """Seconds that one stage works on one pack, all of its chunks together."""

    reference: float
    """Forward; 0, no reference pass."""

    forward: float
    backward: float
    """Also what it computes again."""


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """A schedule: `chunks` > 1 is the interleaved one."""

    packs: int
    chunks: int = 1
    group: int | None = None
    """Packs that go through one chunk before the next one's turn; None, as many as stages."""

    hop_s: float = 0.0
    """Seconds from one stage to the next."""


_Operation = tuple[str, int, int]
"""reference, forward or backward; pack; chunk."""


def step_seconds(stages: Sequence[StageTimes], pipeline: Pipeline) -> float:
    """Seconds until the last stage to finish has finished, from the first one's start."""
    chunks, last = pipeline.chunks, len(stages) - 1
    queues = [_operations(stage, len(stages), pipeline, stages[0]) for stage in range(len(stages))]
    at = [0] * len(stages)
    free = [0.0] * len(stages)
    done: dict[tuple[int, str, int, int], float] = {}

    def ready(stage: int, operation: _Operation) -> float | None:
        """When what the operation needs is there; None, not known yet."""
        kind, pack, chunk = operation
        if kind == "backward":
            if (stage, chunk) == (last, chunks - 1):
                return done.get((stage, "forward", pack, chunk))
            source = (stage + 1, chunk) if stage < last else (0, chunk + 1)
        else:
            if (stage, chunk) == (0, 0):
                return 0.0
            source = (stage - 1, chunk) if stage > 0 else (last, chunk - 1)
        end = done.get((source[0], kind, pack, source[1]))
        return None if end is None else end + pipeline.hop_s

    waiting = True
    while waiting:
        waiting = False
        for stage, queue in enumerate(queues):
            while at[stage] < len(queue):
                kind, pack, chunk = operation = queue[at[stage]]
                start = ready(stage, operation)
                if start is None:
                    break
                free[stage] = max(free[stage], start) + getattr(stages[stage], kind) / chunks
                done[stage, kind, pack, chunk] = free[stage]
                at[stage] += 1
                waiting = True
    assert all(place == len(queue) for place, queue in zip(at, queues, strict=True)), "a deadlock"
    return max(free)


def _operations(
    stage: int, num_stages: int, pipeline: Pipeline, first: StageTimes
) -> list[_Operation]:
    """What a stage does, in order."""
    chunks, group = pipeline.chunks, pipeline.group or num_stages
    order = [
        (pack, chunk)
        for packs in batched(range(pipeline.packs), group)
        for chunk in range(chunks)
        for pack in packs
    ]
    if chunks == 1:
        order = [(pack, 0) for pack in range(pipeline.packs)]
        ahead = num_stages - stage - 1
    else:
        ahead = 2 * (num_stages - stage - 1) + (chunks - 1) * group
    ahead = min(ahead, len(order))
    forward: list[_Operation] = [("forward", *each) for each in order]
    backward: list[_Operation] = [("backward", pack, chunks - 1 - chunk) for pack, chunk in order]
    reference: list[_Operation] = (
        [("reference", *each) for each in order] if first.reference else []
    )
    steady = chain.from_iterable(zip(forward[ahead:], backward, strict=False))
    return [*reference, *forward[:ahead], *steady, *backward[len(order) - ahead :]]
