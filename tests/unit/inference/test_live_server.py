"""A server on a socket: the official client, many at once, slow and vanishing ones, SIGTERM."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from megatron_vico.inference.engine import Engine
from megatron_vico.inference.server.app import Server
from tests.hf_exports import export_hf
from tests.unit.inference.conftest import body, image_part

ROOT = Path(__file__).parents[3]


@contextmanager
def listening(server: Server) -> Iterator[str]:
    """The address of a server that runs in this process."""
    uvicorn_server = uvicorn.Server(uvicorn.Config(server.app, port=0, log_level="warning"))
    thread = threading.Thread(target=uvicorn_server.run)
    thread.start()
    while not uvicorn_server.started:
        time.sleep(0.01)
    port = uvicorn_server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        uvicorn_server.should_exit = True
        thread.join()


def waits_until(true: Callable[[], bool], *, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_official_client(make_server: Callable[..., Server]) -> None:
    with listening(make_server(api_keys=("key",))) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="key", max_retries=0)
        names = [model.id for model in client.models.list().data]
        assert names[0] == "internvl@vir"
        asked: dict[str, Any] = body(image_part(64, 64), {"type": "text", "text": "What?"})
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].finish_reason in ("stop", "length")
        assert whole.usage.model_extra["vico"]["tiles"] == 5
        more = {"mm_processor_kwargs": {"max_dynamic_patch": 1}}
        single = client.chat.completions.create(**asked, extra_body=more)
        assert single.usage.model_extra["vico"]["tiles"] == 1
        raw = client.chat.completions.with_raw_response.create(
            **asked, extra_headers={"X-Request-Id": "task/test/3"}
        )
        assert raw.headers["x-request-id"] == "task/test/3"
        assert raw.headers["x-vico"] == "tiles=5 compressed_tiles=0 visual_tokens=20"
        options = {"include_usage": True}
        parts = list(client.chat.completions.create(**asked, stream=True, stream_options=options))
        text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        assert text == whole.choices[0].message.content
        assert parts[-1].usage.model_extra["vico"] == whole.usage.model_extra["vico"]
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.chat.completions.create(**asked | {"model": "gpt"})
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(**asked | {"max_tokens": 10_000})
        assert error.value.code == "context_length_exceeded"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="x").models.list()


def test_many_at_once_get_their_own_answers(make_server: Callable[..., Server]) -> None:
    """More than the cache has rows; each as when it was alone."""
    server = make_server()
    asked = [
        body(image_part(32 * (1 + n % 2), 64), {"type": "text", "text": "What is it? " * (n % 5)})
        | {"max_tokens": 3 + n % 7, "stream": n % 3 == 0}
        for n in range(24)
    ]
    with listening(server) as address, httpx.Client(timeout=60) as client:

        def answer(fields: dict[str, Any]) -> str:
            return _text(client.post(f"{address}/v1/chat/completions", json=fields))

        alone = [answer(fields) for fields in asked[:8]]
        with ThreadPoolExecutor(12) as pool:
            together = list(pool.map(answer, asked))
        assert together[:8] == alone
        assert server._calls == []


def _text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    if "event-stream" not in response.headers["content-type"]:
        content: str = response.json()["choices"][0]["message"]["content"]
        return content
    parts = [part.removeprefix("data: ") for part in response.text.split("\n\n")[:-2]]
    return "".join(json.loads(part)["choices"][0]["delta"].get("content", "") for part in parts)


@pytest.fixture
def slow_steps(served_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer of 200 tokens takes four seconds."""
    model = served_engine.language_model

    def forward(*args: Any, real: Any = model.forward_batch, **more: Any) -> Any:
        time.sleep(0.02)
        return real(*args, **more)

    monkeypatch.setattr(model, "forward_batch", forward)


def test_who_comes_too_many_is_told_to_come_again(
    make_server: Callable[..., Server], slow_steps: None
) -> None:
    server = make_server(max_concurrency=1)
    with listening(server) as address, httpx.Client() as client:
        url, long = f"{address}/v1/chat/completions", body(max_tokens=200, ignore_eos=True)
        with client.stream("POST", url, json=long | {"stream": True}) as first:
            parts = first.iter_lines()  # kept, for its end would close the stream
            next(parts)
            second = httpx.post(url, json=body())
            assert second.status_code == 429
            assert second.headers["retry-after"] == "1"
            assert second.json()["error"]["type"] == "rate_limit_error"
        # The first one's client has gone: its place and its row are free at once.
        waits_until(lambda: not server._calls and server.thread.scheduler.idle)
        assert client.post(url, json=body()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_is_not_answered(
    make_server: Callable[..., Server], tmp_path: Path, slow_steps: None, stream: bool
) -> None:
    server = make_server()
    asked = body(max_tokens=200, ignore_eos=True, stream=stream)
    with listening(server) as address:
        host, port = address.removeprefix("http://").split(":")
        content = json.dumps(asked)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}"
        with socket.create_connection((host, int(port))) as client:
            client.sendall(f"{head}\r\n\r\n{content}".encode())
            waits_until(lambda: bool(server.thread.scheduler.running))
        waits_until(lambda: not server._calls and server.thread.scheduler.idle, seconds=3)
    (line,) = [json.loads(each) for each in (tmp_path / "log.jsonl").open()]
    assert (line["status"], line["error"]) == (499, "the client went away")
    assert line["completion_tokens"] < 200


@pytest.mark.slow
def test_an_answer_has_its_time(
    make_server: Callable[..., Server], tmp_path: Path, slow_steps: None
) -> None:
    server = make_server(request_timeout_s=1.5)
    asked = body(max_tokens=200, ignore_eos=True, skip_special_tokens=False)
    with listening(server) as address, httpx.Client(timeout=60) as client:
        url = f"{address}/v1/chat/completions"
        assert client.post(url, json=asked).status_code == 408
        *parts, last, _ = client.post(url, json=asked | {"stream": True}).text.split("\n\n")
        assert (
            "no answer within 1.5 s" in json.loads(last.removeprefix("data: "))["error"]["message"]
        )
        assert len(parts) > 1
        waits_until(lambda: not server._calls and server.thread.scheduler.idle)
    statuses = [json.loads(each)["status"] for each in (tmp_path / "log.jsonl").open()]
    assert statuses == [408, 408]


def test_a_slow_body_is_not_waited_for(make_server: Callable[..., Server]) -> None:
    with listening(make_server(body_timeout_s=0.3)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as slow:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{"
            slow.sendall(head.encode())
            assert httpx.post(f"{address}/v1/chat/completions", json=body()).status_code == 200
            assert slow.recv(4096).startswith(b"HTTP/1.1 408")


@pytest.mark.slow
def test_sigterm_lets_answers_come_to_their_end(served_engine: Engine, tmp_path: Path) -> None:
    """The command as a user starts it."""
    modules = {
        "encoder": served_engine.encoder,
        "language_model": served_engine.language_model,
        "model": served_engine.model,
        "tokenizer": served_engine.tokenizer,
    }
    export_hf(tmp_path / "flash", layout="flash", **modules)
    words = (
        "serve --load flash --port 0 --plans none all --request-log log.jsonl --max-model-len 9999"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_vico", *words.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said: queue.Queue[str] = queue.Queue()
    reader = threading.Thread(target=lambda: [said.put(line) for line in process.stdout or ()])
    reader.start()
    try:
        address = ""
        while "running on" not in address:
            address = said.get(timeout=120)
        url = address.partition("http://")[2].split()[0]
        long = body(max_tokens=400, ignore_eos=True, stream=True, skip_special_tokens=False)
        with httpx.stream(
            "POST", f"http://{url}/v1/chat/completions", json=long, timeout=60
        ) as stream:
            lines = stream.iter_lines()
            first = next(lines)
            process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert '"role"' in first
        assert rest[-2] == "data: [DONE]"
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        reader.join()
    (line,) = [json.loads(each) for each in (tmp_path / "log.jsonl").open()]
    assert (line["status"], line["completion_tokens"], line["error"]) == (200, 400, None)
