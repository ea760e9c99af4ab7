"""Ties the lifetime of a worker process of torch's DataLoader to its parent process."""

import multiprocessing
import os
import signal
import threading

PARENT_CHECK_S = 1.0


def live_as_long_as_parent(worker: int) -> None:
    """A `worker_init_fn`: ends the worker when its parent ends or says so, and at no other signal.

    SIGTERM asks the training process for a last checkpoint; schedulers send it to every process of
    a job, as they do SIGUSR1, and terminals SIGINT. A worker that died of it would end the training
    process with an error before the checkpoint is written. One from the training process itself
    means the end; without that, Python would wait for the worker forever at its own.

    torch's worker looks whether its parent is there, but then waits for a pipe that nobody reads
    any more to take what it has left: after a kill, or the sudden end of a failed rank, it would
    keep its memory forever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "only for workers"
    pid = parent.pid

    def end_with_parent() -> None:
        while os.getppid() == pid:
            told = signal.sigtimedwait({signal.SIGTERM}, PARENT_CHECK_S)
            if told is not None and told.si_pid == pid:
                break
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})
    threading.Thread(target=end_with_parent, daemon=True).start()
