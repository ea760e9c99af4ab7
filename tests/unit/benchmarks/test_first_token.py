"""The benchmark of Table 4: bounds beside the paper's figures, an endpoint, this process."""

import argparse
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks import first_token
from megatron_vico.config.registry import get_model_config

SHARE = {"none": 0.0, "random=0.3333": 0.25, "random=0.6667": 0.5, "all": 0.75}


class Handler(BaseHTTPRequestHandler):
    """Counts tokens as `vico serve` does; keeps what it was asked."""

    asked: list[dict] = []  # noqa: RUF012 - of the class: a handler lives for one connection

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append(body)
        visual = round(2560 * (1 - SHARE[body["model"].partition("@")[2]]))
        words = body["messages"][0]["content"][1]["text"].count(" a")
        usage = {"prompt_tokens": visual + 40 + words, "completion_tokens": 1, "total_tokens": 0}
        usage["vico"] = {"tiles": 10, "compressed_tiles": 0, "visual_tokens": visual}
        message = {"role": "assistant", "content": "a"}
        choice = {"index": 0, "message": message, "finish_reason": "length"}
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        data = json.dumps(answer | {"choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()
    Handler.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_the_bound_is_that_of_the_papers_model() -> None:
    model = get_model_config("internvl3_5-8b")
    for (name, text), printed in first_token.PAPER.items():
        for compression, speed_up in zip(first_token.COMPRESSION, printed, strict=True):
            bound = first_token.bound(model, text=text, compression=compression, vit=False)
            if name == "8B":
                # Measured: 0.96 (64 tokens, 25 %) to 1.02 (512, 25 %) of the bound.
                assert 0.95 < speed_up / bound < 1.02, (text, compression, bound)
            with_vit = first_token.bound(model, text=text, compression=compression, vit=True)
            assert 1 <= with_vit <= bound
    plain = (2560 + 64) / (640 + 64)  # linear layers only
    assert plain < first_token.bound(model, text=64, compression=0.75, vit=False) < 1.1 * plain


def test_an_endpoint_is_asked_for_ten_tiles_and_the_text(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"tool --base-url {address} --requests 12 --threads 3 --side-px 32 --paper 8B"
    monkeypatch.setattr(sys, "argv", words.split())
    first_token.main()
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in shown if line[:1] in (["64"], ["512"]) and len(line) == 7]
    assert [row[1] for row in rows] == ["0.0%", "25.0%", "50.0%", "75.0%"] * 2
    assert [row[6] for row in rows[:4]] == ["1.00", "1.29", "1.97", "3.76"]
    for row in rows[:4]:
        assert float(row[3]) == pytest.approx(float(row[2]) / float(rows[0][2]), abs=0.01)
    texts = {body["messages"][0]["content"][1]["text"].count(" a") for body in Handler.asked}
    assert texts == {0, 100, 64 - 6, 512 - 6}
    urls = [body["messages"][0]["content"][0]["image_url"]["url"] for body in Handler.asked[-12:]]
    assert len(set(urls)) == 12  # nothing to be had from a cache
    assert all(body["max_tokens"] == 1 for body in Handler.asked)


@pytest.mark.slow
def test_the_parts_are_timed_in_this_process() -> None:
    args = argparse.Namespace(requests=1, bf16=False)
    rows, parts = first_token.in_process(get_model_config("toy"), args)
    assert len(rows) == 8
    assert min(row.per_s for row in rows) > 0
    assert set(parts) == {"vit_s", "router_s"}
    for size, printed in (("8b", "50.4 M"), ("38b", "491.7 M")):  # the paper: about 50 M, 490 M
        line = first_token.router_line(get_model_config(f"internvl3_5-{size}"), parts, rows)
        assert line.startswith(f"router: {printed} of ")
