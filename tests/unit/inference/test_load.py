"""The load of benchmarks/serve_load.py, in small: every request is answered as it must be."""

import os
from collections.abc import Callable

from benchmarks.serve_load import load
from megatron_vico.inference.server.app import Server
from tests.unit.inference.test_live_server import listening


def test_all_are_answered_and_nothing_is_left(make_server: Callable[..., Server]) -> None:
    server = make_server()
    with listening(server) as url:
        result = load(url, model="internvl", num_requests=40, num_threads=8, pid=os.getpid())
    assert not result.wrong
    assert len(result.seconds) == 36
    assert len(result.memory_mib) == 11
    assert server._calls == []
    assert server.thread._requests == {}
