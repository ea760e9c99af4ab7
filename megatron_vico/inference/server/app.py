"""The HTTP side of `vico serve`: OpenAI's chat completions, models, health and metrics."""

import asyncio
import hmac
import secrets
import sys
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from megatron_vico.errors import printable
from megatron_vico.inference.engine import Engine
from megatron_vico.inference.plans import Prompt
from megatron_vico.inference.sampling import Sampling
from megatron_vico.inference.scheduler import check_length
from megatron_vico.inference.server import figures
from megatron_vico.inference.server.chat import ChatBody, TileLimits, read_body, read_chat
from megatron_vico.inference.server.engine_thread import EngineThread
from megatron_vico.inference.server.errors import ApiError
from megatron_vico.inference.server.models import Models, NamedModel
from megatron_vico.inference.server.replies import Call, Stream, event


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Limits, and what is written down."""

    tiles: TileLimits
    api_keys: tuple[str, ...] = ()
    max_concurrency: int = 256
    """Requests at a time, those that wait included; more are told 429."""

    max_body_bytes: int = 256 << 20
    max_pending_bytes: int = 8 << 30
    """Of bodies and tiles of all requests that are not answered yet; more is told 429."""

    body_timeout_s: float = 60.0
    request_timeout_s: float = 600.0
    num_readers: int = 4
    """Threads that decode images."""

    request_log: Path | None = None
    fingerprint: str = ""
    """Of the weights."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request that can be answered."""

    body: ChatBody
    model: NamedModel
    prompt: Prompt
    sampling: Sampling


class Server:
    """One engine behind an application of FastAPI."""

    def __init__(self, engine: Engine, models: Models, options: ServerOptions) -> None:
        self.engine, self.models, self.options = engine, models, options
        self.thread = EngineThread(engine)
        self.figures = figures.Figures(self.thread)
        self.log = figures.RequestLog(options.request_log)
        self.started = int(time.time())
        self._calls = list[Call]()
        self._warned = set[str]()
        self._readers = ThreadPoolExecutor(options.num_readers, thread_name_prefix="reader")
        self.app = FastAPI(lifespan=self._lifespan, openapi_url=None)
        self.app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        self.app.add_api_route("/v1/models", self.list_models, methods=["GET"])
        self.app.add_api_route("/health", self.health, methods=["GET"])
        self.app.add_api_route("/metrics", self.metrics, methods=["GET"])
        self.app.add_exception_handler(ApiError, _answer_error)
        self.app.add_exception_handler(HTTPException, _answer_error)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.thread.start()
        yield
        # uvicorn has let every request come to its end before.
        await asyncio.to_thread(self.thread.stop)
        self._readers.shutdown()
        self.log.close()

    async def health(self) -> Response:
        """200 while requests are answered, else 503."""
        return Response(status_code=200 if self.thread.usable else 503)

    async def metrics(self) -> Response:
        """For Prometheus."""
        figures_of_all = generate_latest(self.figures.registry)
        return Response(figures_of_all, media_type=CONTENT_TYPE_LATEST)

    async def list_models(self, request: Request) -> Response:
        """A model a plan; clients that take the first get the default."""
        self._check_key(request)
        models = [
            {
                "id": name,
                "object": "model",
                "created": self.started,
                "owned_by": "megatron_vico",
                "root": self.models.served,
                "max_model_len": self.engine.max_len,
            }
            for name in self.models.names
        ]
        return JSONResponse({"object": "list", "data": models})

    async def chat(self, request: Request) -> Response:
        """A completion, or a stream of its parts."""
        given = request.headers.get("x-request-id", "")
        usable = given.isascii() and given.isprintable() and 0 < len(given) <= 256
        call = Call(
            request_id=given if usable else f"chatcmpl-{uuid.uuid4().hex}",
            since=time.time(),
            fingerprint=self.options.fingerprint,
        )
        self._calls.append(call)
        stream = None
        try:
            asked = await self._asked(request, call)
            updates = self._updates(asked, call, request)
            await anext(updates)  # what cannot be answered is not a stream yet
            if asked.body.stream:
                parts, over = self._stream(asked, call, updates), partial(self._over, call, updates)
                stream = Stream(parts, over=over, headers=call.headers())
                return stream
            async for _ in updates:
                pass
            call.succeeded()
            return JSONResponse(call.completion(), headers=call.headers())
        except Exception as error:
            failure = call.failed(error)
            return JSONResponse(
                failure.body,
                status_code=failure.status,
                headers=failure.headers | {"x-request-id": call.request_id},
            )
        finally:
            if stream is None:
                self._end(call)

    def _check_key(self, request: Request) -> None:
        if self.options.api_keys:
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            keys = self.options.api_keys
            known = [hmac.compare_digest(key.encode(), each.encode()) for each in keys]
            if scheme.lower() != "bearer" or not any(known):
                raise ApiError(
                    401,
                    "no valid API key; expected the header Authorization: Bearer KEY, with a key"
                    " of --api-key.",
                    code="invalid_api_key",
                )

    async def _asked(self, request: Request, call: Call) -> Asked:
        self._check_key(request)
        most = self.options.max_concurrency
        if len(self._calls) > most:
            raise ApiError(429, f"{most} requests are being answered already; come again.")
        if not self.thread.usable:
            raise ApiError(503, "the engine has stopped; see the server's log.")
        content = await self._content(request, call)
        loop = asyncio.get_running_loop()
        asked = await loop.run_in_executor(self._readers, self._read, content, call)
        self._hold(call, sum(part.tiles.nbytes for part in asked.prompt.parts))
        return asked

    def _hold(self, call: Call, num_bytes: int) -> None:
        call.num_bytes = num_bytes
        pending, most = sum(each.num_bytes for each in self._calls), self.options.max_pending_bytes
        if pending > most:
            raise ApiError(
                429, f"requests that wait hold {pending} bytes, of {most} at most; come again."
            )

    async def _content(self, request: Request, call: Call) -> bytes:
        """The body; never more of it in memory than may be sent."""
        most = self.options.max_body_bytes
        length = request.headers.get("content-length", "")
        too_large = ApiError(
            413, f"the body is larger than {most} bytes; send fewer or smaller images."
        )
        if length.isdecimal() and int(length) > most:
            raise too_large
        chunks, size = list[bytes](), 0
        try:
            async with asyncio.timeout(self.options.body_timeout_s):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > most:
                        raise too_large
                    chunks.append(chunk)
                    self._hold(call, size)
        except TimeoutError:
            seconds = self.options.body_timeout_s
            raise ApiError(
                408, f"the body did not come within {seconds:g} s; send it faster."
            ) from None
        return b"".join(chunks)

    def _read(self, content: bytes, call: Call) -> Asked:
        """In a reader's thread: JSON, base64, images, tiles, ids."""
        body = read_body(content)
        call.model = body.model
        model = self.models.find(body.model)
        call.plan = model.plan_name
        self._warn(body)
        chat = read_chat(body, limits=self.options.tiles, suffix=model.max_tiles)
        sampling = _sampling(body)
        fewest = self.engine.model.compressed_tokens_per_tile
        wanted = sampling.max_new_tokens or 1
        # What cannot fit is told before its images are decoded, and before the ViT sees them.
        check = partial(check_length, wanted=wanted, most=self.engine.max_len)
        check(len(chat.sample.images) * fewest)
        prompt = self.engine.prompt(
            chat.sample, history="given", tiles_of_image=chat.tiles_of_image
        )
        num_text = sum(len(part.token_ids) - part.num_tiles for part in prompt.parts)
        check(num_text + prompt.num_tiles * fewest)
        return Asked(body=body, model=model, prompt=prompt, sampling=sampling)

    def _warn(self, body: ChatBody) -> None:
        """Of fields that nothing here looks at; once each."""
        unknown = set(body.model_extra or ()) - self._warned
        if unknown and len(self._warned) < 100:
            self._warned |= unknown
            names = printable(", ".join(sorted(unknown))[:200])
            print(f"note: fields of requests that are ignored: {names}", file=sys.stderr)

    async def _updates(self, asked: Asked, call: Call, request: Request) -> AsyncGenerator[str]:
        """The text so far, whenever there is more of it; first once there is a token."""
        run = self.thread.run(asked.prompt, asked.model.plan, asked.sampling)
        shown, most = None, self.options.request_timeout_s
        end = time.monotonic() + most  # no asyncio.timeout: a stream goes on in another task
        try:
            async for state in run:
                call.request = state
                if state.error is not None:
                    raise state.error
                if await request.is_disconnected():
                    raise ClientDisconnect
                if time.monotonic() > end and state.finish_reason is None:
                    raise ApiError(408, f"no answer within {most:g} s; ask for fewer tokens.")
                if state.num_said and state.answers[0].text != shown:
                    shown = state.answers[0].text
                    yield shown
        finally:
            await run.aclose()

    async def _stream(
        self, asked: Asked, call: Call, updates: AsyncIterator[str]
    ) -> AsyncIterator[str]:
        """Server-sent events; `updates` have begun."""
        assert call.request is not None
        sent = call.request.answers[0].text
        try:
            yield call.chunk({"role": "assistant", "content": sent})
            async for text in updates:
                if text != sent:
                    yield call.chunk({"content": text[len(sent) :]})
                    sent = text
            call.succeeded()
            yield call.chunk({}, finish_reason=call.request.finish_reason)
            if (asked.body.stream_options or {}).get("include_usage"):
                yield call.chunk(None, usage=call.usage())
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield event(call.failed(error).body)

    async def _over(self, call: Call, updates: AsyncGenerator[str]) -> None:
        await updates.aclose()
        self._end(call)

    def _end(self, call: Call) -> None:
        """Write down how a request ended."""
        self._calls.remove(call)
        line = call.log_line()
        self.log.write(line)
        reason = call.request.finish_reason if call.request and call.status == 200 else None
        self.figures.count(line, label=self.models.label(call.model), finish_reason=reason)


def _sampling(body: ChatBody) -> Sampling:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    temperature = 1.0 if body.temperature is None else body.temperature
    return Sampling(
        max_new_tokens=body.max_completion_tokens or body.max_tokens,
        temperature=temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        seed=secrets.randbits(62) if body.seed is None else body.seed,
        stop=tuple(stop),
        ignore_eos=bool(body.ignore_eos),
        skip_special_tokens=body.skip_special_tokens is not False,
    )


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError | HTTPException)
    if isinstance(error, HTTPException):
        message = f"{request.method} {request.url.path}: {error.detail}."
        error = ApiError(error.status_code, message)
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)
