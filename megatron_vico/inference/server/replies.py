"""What goes back to a client, and what is written down of it."""

import json
import sys
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from megatron_vico.errors import SampleError
from megatron_vico.inference.plans import decisions
from megatron_vico.inference.scheduler import Request, TooLongError
from megatron_vico.inference.server.errors import ApiError


@dataclass(kw_only=True, eq=False)
class Call:
    """A request over HTTP on its way."""

    request_id: str
    since: float
    fingerprint: str
    model: str = ""
    plan: str = ""
    request: Request | None = None
    status: int = 499
    error: str | None = "the client went away"
    num_bytes: int = 0
    """What it holds of the memory for requests that wait."""

    def succeeded(self) -> None:
        """All was said."""
        self.status, self.error = 200, None

    def failed(self, error: Exception) -> ApiError:
        """What the client is told of an error."""
        failure = _failure(error)
        self.status, self.error = failure.status, failure.message
        return failure

    def counts(self) -> dict[str, int]:
        """The plan in numbers; zeros while there is none."""
        routed = None if self.request is None else self.request.routed
        return {
            "tiles": 0 if routed is None else len(routed.compressed_N),
            "compressed_tiles": 0 if routed is None else int(routed.compressed_N.sum()),
            "visual_tokens": 0 if routed is None else routed.num_visual_tokens,
        }

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompt as the model read it, after compression."""
        routed = None if self.request is None else self.request.routed
        prompt = 0 if routed is None else routed.num_tokens
        said = 0 if self.request is None else self.request.num_said
        tokens = {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}
        return tokens | {"vico": self.counts()}

    def headers(self) -> dict[str, str]:
        """For clients that drop what they do not know of `usage`."""
        counts = " ".join(f"{name}={number}" for name, number in self.counts().items())
        return {"x-request-id": self.request_id, "x-vico": counts}

    def completion(self) -> dict[str, Any]:
        """The answer in one piece."""
        assert self.request is not None
        message = {"role": "assistant", "content": self.request.answers[0].text}
        choice = {"index": 0, "message": message, "logprobs": None}
        choice["finish_reason"] = self.request.finish_reason
        return self._head("chat.completion") | {"choices": [choice], "usage": self.usage()}

    def chunk(self, delta: dict[str, Any] | None, **more: Any) -> str:
        """A piece of it, as a server-sent event; without `delta`, of the usage."""
        reason = more.pop("finish_reason", None)
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        choices = [] if delta is None else [choice]
        return event(self._head("chat.completion.chunk") | {"choices": choices} | more)

    def log_line(self) -> dict[str, Any]:
        """A request as `--request-log` has it.

        Keys: `id` (X-Request-Id, else the server's own), `time` (Unix seconds at which it came),
        `model` (as it was asked for), `plan`, `status` (of HTTP; 499: the client went away),
        `prompt_tokens`, `completion_tokens`, `tiles`, `compressed_tiles`, `visual_tokens`, `images`
        (a list of width, height, sha256 of the file, tiles, compressed_tiles, plan: a 0 or 1 a
        tile), `seconds` (queue, encode, prefill, decode), `error` (a text or null).
        """
        routed = None if self.request is None else self.request.routed
        usage = self.usage()
        line = {"id": self.request_id, "time": self.since, "model": self.model, "plan": self.plan}
        line |= {"status": self.status}
        line |= {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
        line |= self.counts()
        line["images"] = []
        if self.request is not None and routed is not None:
            line["images"] = decisions(self.request.prompt, routed.compressed_N)
        spent = {} if self.request is None else self.request.seconds
        phases = ("queue", "encode", "prefill", "decode")
        line["seconds"] = {phase: round(spent.get(phase, 0.0), 6) for phase in phases}
        return line | {"error": self.error}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.request_id,
            "object": kind,
            "created": int(self.since),
            "model": self.model,
            "system_fingerprint": f"{self.fingerprint}-{self.plan}",
        }


class Stream(StreamingResponse):
    """Says when it is over, also where its client left before it began."""

    def __init__(self, parts: Any, *, over: Callable[[], Awaitable[None]], **fields: Any) -> None:
        super().__init__(parts, media_type="text/event-stream", **fields)
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As Starlette calls it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._over()


def event(contents: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(contents)}\n\n"


def _failure(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, SampleError):
        code = "context_length_exceeded" if isinstance(error, TooLongError) else None
        return ApiError(400, str(error), param="messages", code=code)
    if isinstance(error, ClientDisconnect):
        return ApiError(499, "the client went away")
    traceback.print_exception(error, file=sys.stderr)
    return ApiError(500, f"the server failed ({type(error).__name__}); see its log.")
