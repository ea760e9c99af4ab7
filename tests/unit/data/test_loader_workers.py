"""Workers, prefetching, stops and resumes change no batch; what ends a worker, and what a run says
then."""

import itertools
import json
import multiprocessing
import os
import pickle
import random
import select
import signal
import subprocess
import threading

import pytest

from megatron_vico.data.load.loader import MAX_PIECES, worker_death_explained
from megatron_vico.data.load.worker_life import live_as_long_as_parent
from megatron_vico.errors import ConfigError, WorkerError
from tests.packs import whole_packs
from tests.unit.conftest import COST, GLOBAL_BATCH, flat_steps, joined_packs, take


def test_workers_can_be_started_without_fork(load):
    """Python 3.14 and macOS pickle the data set for their workers; to start one takes seconds, so
    only that is done."""
    again = pickle.loads(pickle.dumps(load()))
    assert flat_steps(take(again, 2)) == flat_steps(take(load(), 2))


def test_batches_come_from_workers_in_few_pieces_of_memory(load):
    """Not one shared file a tensor: a process may have about a thousand open. Several workers share
    a step."""
    loader = load(num_workers=2, stage="router", global_batch_size=MAX_PIECES + 8)
    blocks = next(iter(loader))
    assert [pack.position for pack in whole_packs(blocks)] == list(range(MAX_PIECES + 8))
    assert len(blocks) == MAX_PIECES // 2 + 4  # of two packs each


def test_workers_prepare_no_more_than_the_steps_asked_for(load):
    """Of 4 packs a step; one worker has them all."""
    for num_workers in (0, 1):
        assert len(list(load(num_steps=2, num_workers=num_workers))) == 2
    loader = load(num_workers=1, prefetch_steps=3)
    take(loader, 2)
    assert loader.plan_state.consumed_packs == 2 * GLOBAL_BATCH
    assert loader.begun_packs == (2 + 3) * GLOBAL_BATCH


@pytest.mark.slow
def test_random_stops_and_resumes_change_nothing(load):
    """Of every step of 24, the packs in their order, whatever ranks, workers and prefetching there
    are in between; some ranks get a part of a pack."""
    draw = random.Random(5)
    whole = [joined_packs(step) for step in take(load(cost=COST), 24)]
    done, state, layouts, cut = 0, None, set(), 0
    while done < len(whole):
        dp_size, num_workers = draw.choice((1, 2, 4)), draw.choice((0, 1, 2))
        layouts.add((dp_size, num_workers))
        loaders = [
            load(
                cost=COST,
                dp_rank=rank,
                dp_size=dp_size,
                state=state,
                num_workers=num_workers,
                prefetch_steps=draw.choice((1, 3)),
            )
            for rank in range(dp_size)
        ]
        num_steps = min(draw.randint(1, 4), len(whole) - done)
        for of_ranks in zip(*(take(loader, num_steps) for loader in loaders), strict=True):
            packs = list(itertools.chain(*of_ranks))
            assert joined_packs(packs) == whole[done]
            cut += len(packs) > GLOBAL_BATCH
            done += 1
        states = [json.dumps(loader.state_dict()) for loader in loaders]
        assert len(set(states)) == 1
        state = json.loads(states[0])
    assert len(layouts) >= 4
    assert cut


DIED = "^a worker process of the loader died"


def started(loader):
    """Its iterator after a step, and its one worker; other tests may have left some."""
    others = multiprocessing.active_children()
    steps = iter(loader)
    next(steps)
    (worker,) = (each for each in multiprocessing.active_children() if each not in others)
    return steps, worker


def test_workers_outlive_a_schedulers_signal_but_not_their_parents(load):
    """At its own end the parent sends SIGTERM and then waits for them, however long it takes."""
    steps, worker = started(load(num_workers=1))
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert len(list(itertools.islice(steps, 8))) == 8
    del steps
    worker.join(60)
    _stopped, worker = started(load(num_workers=1))
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0


def test_a_worker_ends_with_a_parent_that_was_killed():
    """Whatever it waits for: torch's waits for its queue to be read before it looks at its parent
    again."""
    still_there, held = os.pipe()
    parent = os.fork()
    if parent == 0:
        worker = multiprocessing.get_context("fork").Process(target=_wait_for_ever)
        worker.start()
        os.write(held, b"x")
        worker.join()
    os.close(held)
    os.read(still_there, 1)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    poll = select.poll()  # takes descriptors of any number
    poll.register(still_there)
    assert poll.poll(60_000), "the worker is still there"
    assert os.read(still_there, 1) == b""  # the last process that held the other end has ended


def _wait_for_ever():
    live_as_long_as_parent(0)
    threading.Event().wait()


def test_a_worker_that_is_killed_ends_the_run_with_the_likely_cause(load):
    """What the kernel does where memory ran out; torch notices wherever the process is then."""
    steps, worker = started(load(num_workers=1, prefetch_steps=1))

    @worker_death_explained()
    def go_on():
        os.kill(worker.pid, signal.SIGKILL)
        # Or torch's handler may raise behind this test.
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        return list(steps)

    with pytest.raises(WorkerError, match=rf"{DIED} .*fewer --num-workers"):
        go_on()


def test_a_worker_that_is_killed_while_it_hands_over_is_no_riddle(load, monkeypatch):
    def broken_off(*_, **__):
        raise ConnectionResetError("Connection reset by peer")
        yield

    monkeypatch.setattr("megatron_vico.data.load.loader.DataLoader", broken_off)
    with pytest.raises(WorkerError, match=rf"{DIED} \(Connection reset by peer\)"):
        take(load(num_workers=1), 1)


def test_a_cache_that_is_too_small_is_one_line_also_from_a_worker(load, shards, tmp_path):
    cache = {"data_cache_dir": str(tmp_path), "data_cache_gb": 1e-6}
    message = r"^--data-cache-gb 1e-06 is less than shard-\d+\.tar alone"
    with pytest.raises(ConfigError, match=message):
        take(load(data_path=(f"file://{shards}",), num_workers=1, **cache), 1)
