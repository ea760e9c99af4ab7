"""The engine in a thread of its own, beside the server's event loop; and on the other ranks.

Under tensor parallelism every rank runs the same steps: the first one tells the others, before each
step, which requests came and which were let go.
"""

import asyncio
import contextlib
import queue
import sys
import threading
import traceback
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_vico.inference.engine import Engine
from megatron_vico.inference.plans import PlanSource, Prompt
from megatron_vico.inference.sampling import Sampling
from megatron_vico.inference.scheduler import Request, Scheduler

_MOST_FAILURES = 3
"""Steps in a row that may fail before the server says that it cannot serve."""

_SIGN_OF_LIFE_S = 30.0
"""Ranks that wait for the first one would give up after the timeout of their group."""


@dataclass(frozen=True)
class _Order:
    """What all ranks do before their next step; `prompt` is None to let a request go."""

    number: int
    prompt: Prompt | None = None
    plan: PlanSource = "none"
    sampling: Sampling | None = None


class EngineThread:
    """Takes requests from the event loop and runs them; `follow` does so on the other ranks."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.scheduler = Scheduler(engine)
        self.failures = 0
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._requests: dict[int, Request] = {}
        self._last_number = 0
        self._thread = threading.Thread(target=self.follow, name="engine", daemon=True)

    @property
    def usable(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and self.failures < _MOST_FAILURES

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """End, on all ranks."""
        self._orders.put(None)
        self._thread.join()

    async def run(
        self, prompt: Prompt, plan: PlanSource, sampling: Sampling
    ) -> AsyncGenerator[Request]:
        """Answer a prompt; yields its request whenever that went on, and each second.

        Who stops to listen lets it go.
        """
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        request = Request(
            prompt=prompt,
            plan=plan,
            sampling=sampling,
            progressed=lambda _: loop.call_soon_threadsafe(changed.set),
        )
        self._last_number += 1
        number = self._last_number
        self._requests[number] = request
        self._orders.put(_Order(number, prompt, plan, sampling))
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), timeout=1.0)
                changed.clear()
                ended = request.finish_reason is not None
                yield request
                if ended:
                    break
        finally:
            self._orders.put(_Order(number))

    def follow(self) -> None:
        """Run until the first rank stops."""
        while True:
            orders = self._next_orders()
            if None in orders:
                return
            try:
                for order in orders:
                    if order is not None:
                        self._obey(order)
                if not self.scheduler.idle:
                    self.scheduler.step()
                    self.failures = 0
            except Exception as error:
                traceback.print_exc(file=sys.stderr)
                self.failures += 1
                self.scheduler.fail(error)
                if self.engine.language_model.tp_group.size() > 1:
                    raise  # others are in the middle of a step

    def _next_orders(self) -> list[_Order | None]:
        orders = list[_Order | None]()
        group = self.engine.language_model.tp_group
        if group.rank() == 0:
            try:
                wait_s = _SIGN_OF_LIFE_S if self.scheduler.idle else 0.0
                orders.append(self._orders.get(block=wait_s > 0, timeout=wait_s or None))
                while True:
                    orders.append(self._orders.get_nowait())
            except queue.Empty:
                pass
        if group.size() > 1:
            box: list[Any] = [orders]
            source = torch.distributed.get_global_rank(group, 0)
            torch.distributed.broadcast_object_list(
                box, src=source, group=group, device=self.engine.device
            )
            (orders,) = box
        return orders

    def _obey(self, order: _Order) -> None:
        if order.prompt is None or order.sampling is None:
            request = self._requests.pop(order.number, None)
            if request is not None:
                self.scheduler.cancel(request)
            return
        known = self._requests.get(order.number)
        if known is None:  # another rank's
            known = Request(prompt=order.prompt, plan=order.plan, sampling=order.sampling)
            self._requests[order.number] = known
        self.scheduler.add(known)
