"""`vico serve` to its clients: answers, streams, errors, limits, figures and the request log."""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from megatron_vico.data.samples import ConversationSample, Turn
from megatron_vico.inference.engine import Engine
from megatron_vico.inference.plans import read_replay
from megatron_vico.inference.server.app import Server
from megatron_vico.inference.server.chat import read_body, read_chat
from tests.unit.inference.conftest import body, data_url, image_part, plan

CHAT = "/v1/chat/completions"
RECORDED = json.loads((Path(__file__).parent / "harness_requests.json").read_text())


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    return make_server()


@pytest.fixture
def client(server: Server) -> Iterator[TestClient]:
    with TestClient(server.app) as client:
        yield client


def lines(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]


def events(text: str) -> list[dict[str, Any]]:
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded["name"])
def test_requests_of_the_harnesses_are_answered(
    recorded: dict[str, Any], client: TestClient, tmp_path: Path
) -> None:
    """Bodies and headers as VLMEvalKit and lmms-eval send them; images and answers are shorter."""
    response = client.post(CHAT, json=recorded["body"], headers=recorded["headers"])
    assert response.status_code == 200, response.text
    if recorded["body"].get("stream"):
        choices = [event["choices"][0] for event in events(response.text)]
        assert choices[-1]["finish_reason"] in ("stop", "length")
    else:
        (choice,) = response.json()["choices"]
        assert isinstance(choice["message"]["content"], str)
        usage = response.json()["usage"]
        assert usage["vico"]["tiles"] == recorded["tiles"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    (line,) = lines(tmp_path)
    assert (line["status"], line["model"]) == (200, recorded["body"]["model"])
    assert line["tiles"] == recorded["tiles"] == sum(each["tiles"] for each in line["images"])
    assert line["compressed_tiles"] == sum(each["compressed_tiles"] for each in line["images"])
    assert line["visual_tokens"] == 4 * line["tiles"] - 3 * line["compressed_tiles"]


def test_the_answer_is_the_engines(client: TestClient, server: Server) -> None:
    engine = server.engine
    for name in ("vir", "none", "all", "image"):
        asked = body(image_part(64, 64), {"text": "What is it?"}, model=f"internvl@{name}")
        found = client.post(CHAT, json=asked | {"skip_special_tokens": False}).json()
        chat = read_chat(
            read_body(json.dumps(asked).encode()), limits=server.options.tiles, suffix=None
        )
        turns = (Turn("human", "<image>\nWhat is it?"),)
        sample = ConversationSample(key="k", turns=turns, images=chat.sample.images)
        (expected,) = engine.answer([engine.prompt(sample)], plan=plan(name), max_new_tokens=4)
        assert found["choices"][0]["message"]["content"] == expected.texts[0]
        assert found["usage"]["vico"] == {
            "tiles": 5,
            "compressed_tiles": int(expected.compressed_N.sum()),
            "visual_tokens": expected.num_visual_tokens,
        }


def test_prompt_tokens_are_counted_after_compression(client: TestClient) -> None:
    """As harnesses that keep nothing else find the ratio from them."""
    asked = body(image_part(64, 64), {"text": "?"})
    found = {
        name: client.post(CHAT, json=asked | {"model": f"internvl@{name}"}).json()["usage"]
        for name in ("none", "all", "random=0.4")
    }
    none, every, some = (found[name]["prompt_tokens"] for name in found)
    assert none - every == 3 * 5
    assert none - some == 3 * found["random=0.4"]["vico"]["compressed_tiles"] == 3 * 2


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_stream_has_the_same_text(temperature: float, client: TestClient) -> None:
    asked = body(
        image_part(), max_tokens=40, temperature=temperature, seed=5, ignore_eos=True, stop=["z"]
    ) | {"skip_special_tokens": False}
    whole = client.post(CHAT, json=asked).json()
    streamed = client.post(
        CHAT, json=asked | {"stream": True, "stream_options": {"include_usage": True}}
    )
    assert streamed.headers["content-type"].startswith("text/event-stream")
    *parts, last = events(streamed.text)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    deltas = [part["choices"][0]["delta"] for part in parts]
    assert deltas[0]["role"] == "assistant"
    text = "".join(delta.get("content", "") for delta in deltas)
    assert text == whole["choices"][0]["message"]["content"]
    assert len(text) > 3
    assert parts[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}


def test_models_health_and_unknown_paths(client: TestClient) -> None:
    found = client.get("/v1/models").json()
    assert [each["id"] for each in found["data"]] == [
        f"internvl@{name}" for name in ("vir", "none", "all", "random=0.55", "image")
    ]
    assert found["data"][0]["max_model_len"] == 512
    assert client.get("/health").status_code == 200
    for method, path, status in (("GET", "/v2", 404), ("GET", CHAT, 405), ("GET", "/docs", 404)):
        response = client.request(method, path)
        assert response.status_code == status
        assert path in response.json()["error"]["message"]


BAD: list[tuple[Any, int, str]] = [
    (b"{", 400, "no JSON object"),
    (b"[" * 200_000, 400, "no JSON object"),
    (body(model="gpt-4o"), 404, "does not exist"),
    (body(n=3), 400, "n '3' is not supported"),
    (body({"type": "image_url", "image_url": "http://127.0.0.1:1/x.png"}), 400, "fetches nothing"),
    (body({"type": "image_url", "image_url": "data:image/png;base64,AAAA"}), 400, "image 0"),
    (
        body({"type": "image_url", "image_url": data_url(64, 64)[:-60]}),
        400,
        "image 0",
    ),
    (body(max_tokens=600), 400, "maximum context length is 512 tokens. However, you requested"),
    (body({"text": "ab " * 400}), 400, "maximum context length is 512 tokens"),
    (body(*[image_part(8, 8)] * 520), 400, "maximum context length is 512 tokens"),
    (body(image_part(64, 64, max_dynamic_patch=10**9)), 400, "expected 1 to 64 tiles"),
]


def test_bad_requests_are_told_and_touch_nobody(
    client: TestClient, server: Server, tmp_path: Path
) -> None:
    good = body(image_part(64, 64), {"text": "What is it?"})
    expected = client.post(CHAT, json=good).json()["choices"]
    for asked, status, message in BAD:
        content = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
        for more in (b"", b' {"x":'):  # and with something behind it
            response = client.post(CHAT, content=content + more, headers={"x-request-id": "t/s/1"})
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert response.headers["x-request-id"] == "t/s/1"
            if not more:
                assert (response.status_code, message in error["message"]) == (status, True), error
            else:
                assert response.status_code == 400
        line = lines(tmp_path)[-2]
        assert (line["id"], line["status"], message in line["error"]) == ("t/s/1", status, True)
        assert client.post(CHAT, json=good).json()["choices"] == expected
    too_long = client.post(CHAT, json=body(max_tokens=600)).json()["error"]
    assert too_long["code"] == "context_length_exceeded"
    assert server._calls == []
    assert server.thread.scheduler.idle


def test_keys(make_server: Callable[..., Server]) -> None:
    with TestClient(make_server(api_keys=("one", "two")).app) as client:
        for header in ({}, {"authorization": "Bearer x"}, {"authorization": "Basic one"}):
            for response in (
                client.get("/v1/models", headers=header),
                client.post(CHAT, json=body(), headers=header),
            ):
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
        good = {"authorization": "Bearer two"}
        assert client.get("/v1/models", headers=good).status_code == 200
        assert client.post(CHAT, json=body(), headers=good).status_code == 200
        assert client.get("/health").status_code == 200


def test_sizes_and_times_have_limits(make_server: Callable[..., Server]) -> None:
    with TestClient(make_server(max_body_bytes=2000).app) as client:
        assert client.post(CHAT, json=body()).status_code == 200
        large = json.dumps(body({"text": "x" * 3000})).encode()
        pieces = (large[at : at + 100] for at in range(0, len(large), 100))  # without its length
        for content in (large, pieces):
            response = client.post(CHAT, content=content)
            assert response.status_code == 413
            assert "larger than 2000 bytes" in response.json()["error"]["message"]
    with TestClient(make_server(max_pending_bytes=5000).app) as client:
        response = client.post(CHAT, json=body(image_part(64, 64)))
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    slow = make_server(request_timeout_s=0.0)
    with TestClient(slow.app) as client:
        response = client.post(CHAT, json=body(max_tokens=200, ignore_eos=True))
        assert response.status_code == 408
        assert client.post(CHAT, content=b"{").status_code == 400
    assert slow._calls == []


def test_a_step_that_fails_fails_its_requests_alone(
    client: TestClient, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = server.engine.language_model

    def broken(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.undo()
        raise RuntimeError("broken")

    monkeypatch.setattr(model, "forward_batch", broken)
    response = client.post(CHAT, json=body())
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert client.post(CHAT, json=body()).status_code == 200
    assert client.get("/health").status_code == 200
    monkeypatch.setattr(model, "forward_batch", lambda *args, **kwargs: 1 / 0)
    assert [client.post(CHAT, json=body()).status_code for _ in range(4)] == [500, 500, 500, 503]
    assert client.get("/health").status_code == 503


def test_figures_are_counted(client: TestClient) -> None:
    usage = client.post(CHAT, json=body(image_part(64, 64), model="internvl@all")).json()["usage"]
    client.post(CHAT, json=body(model="internvl@random=0.123+tiles=9"))
    client.post(CHAT, json=body(model="x" * 500))
    found = client.get("/metrics").text
    label = 'model_name="internvl@all"'
    for name, value in (
        ("prompt_tokens_total", usage["prompt_tokens"]),
        ("generation_tokens_total", usage["completion_tokens"]),
        ("tiles_total", 5),
        ("compressed_tiles_total", 5),
        ("visual_tokens_total", 5),
        ("e2e_request_latency_seconds_count", 1),
    ):
        assert f"vico:{name}{{{label}}} {float(value)}\n" in found
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert f"vico:{name} 0.0\n" in found
    assert 'vico:request_failed_total{model_name="internvl@other",status="404"} 1.0' in found
    assert 'vico:request_success_total{finished_reason="stop",model_name="internvl@all"}' in found
    assert "xxxx" not in found


def test_a_line_says_all_of_a_request(client: TestClient, tmp_path: Path) -> None:
    asked = body(image_part(64, 64), image_part(32, 32), {"text": "?"}, model="internvl@vir")
    client.post(CHAT, json=asked, headers={"X-Request-Id": "docvqa_val/val/17"})
    client.post(CHAT, json=body(), headers={"X-Request-Id": b"\xe9"})
    line, other = lines(tmp_path)
    assert line["id"] == "docvqa_val/val/17"
    assert other["id"].startswith("chatcmpl-")
    assert list(line) == (
        "id time model plan status prompt_tokens completion_tokens tiles compressed_tiles"
        " visual_tokens images seconds error".split()
    )
    assert (line["plan"], line["error"], line["tiles"]) == ("vir", None, 6)
    first, second = line["images"]
    assert (first["width"], first["height"], first["tiles"]) == (64, 64, 5)
    content = base64.b64decode(data_url(32, 32).partition(",")[2])
    assert second["sha256"] == hashlib.sha256(content).hexdigest()
    assert all(seconds >= 0 for seconds in line["seconds"].values())
    # It is a file of decisions too.
    decided = read_replay(tmp_path / "log.jsonl").decisions
    assert decided[first["sha256"], 5] == first["plan"]
    assert first["plan"].count("1") == first["compressed_tiles"]


def test_the_fingerprint_is_of_the_weights(served_engine: Engine) -> None:
    from megatron_vico.inference.loading import fingerprint

    before = fingerprint(served_engine)
    weight = served_engine.encoder.vir.gating.gate[1].bias
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0] += 1e-6
        assert fingerprint(served_engine) != before
        weight.copy_(kept)
    assert fingerprint(served_engine) == before
