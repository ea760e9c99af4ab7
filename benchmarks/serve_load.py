#!/usr/bin/env python3
"""`vico serve` under load: failures, seconds a request, and the server's memory before and after.

    python benchmarks/serve_load.py --threads 32 --requests 2000
    python benchmarks/serve_load.py --url http://host:8000 --model internvl --pid 1234

Without --url a toy is made and served in a process of its own. Requests have every plan, none to
three images, long and short texts, greedy and drawn answers, streamed and whole; one in ten is one
that must be refused.
"""

import argparse
import base64
import collections
import concurrent.futures
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
# Run as a script, only this folder is on the path.
sys.path.insert(0, str(ROOT))

PLANS = ("none", "all", "vir", "random=0.55", "image", "none+tiles=1")
SIZES = ((32, 32), (64, 64), (96, 32), (300, 200))
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to."""

    seconds: tuple[float, ...]
    """Of each request that was to be answered."""

    wrong: collections.Counter[str]
    """Requests that had another status than they should, by both."""

    wall_s: float
    memory_mib: tuple[float, ...]
    """Of the server: before, and then after each tenth of the requests; empty without its pid."""

    def __str__(self) -> str:
        p50, p99 = np.percentile(self.seconds, (50, 99))
        lines = [
            f"{len(self.seconds)} requests answered in {self.wall_s:.1f} s, p50 {p50:.3f} s,"
            f" p99 {p99:.3f} s; wrong: {dict(self.wrong) or 'none'}"
        ]
        if self.memory_mib:
            shown = ", ".join(f"{each:.0f}" for each in self.memory_mib)
            lines.append(f"memory of the server, MiB: {shown}")
        return "\n".join(lines)


def request(number: int, *, model: str) -> tuple[dict[str, Any], int]:
    """A body, and the status that its answer must have; the same for the same number."""
    draw = random.Random(number)
    parts: list[dict[str, Any]] = []
    for _ in range(draw.randrange(4)):
        width, height = draw.choice(SIZES)
        colour = tuple(draw.randrange(256) for _ in range(3))
        file = io.BytesIO()
        Image.new("RGB", (width, height), colour).save(file, "png")
        data = base64.b64encode(file.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": f"data:image/png;base64,{data}"})
    parts.append({"type": "text", "text": "What is it? " * draw.randrange(1, 9)})
    body: dict[str, Any] = {
        "model": f"{model}@{draw.choice(PLANS)}",
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": draw.randrange(1, 17),
        "temperature": draw.choice((0, 0, 0.7)),
        "stream": draw.random() < 0.3,
    }
    if number % 10:
        return body, 200
    refused: list[tuple[dict[str, Any], int]] = [
        ({"model": "nobody"}, 404),
        ({"n": 2}, 400),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400),
        ({"max_tokens": 1 << 40}, 400),
    ]
    change, status = draw.choice(refused)
    return body | change, status


def load(
    url: str, *, model: str, num_requests: int, num_threads: int, pid: int | None = None
) -> Result:
    """Send requests from threads, and look whether each is answered as it must be."""
    seconds, wrong = list[float](), collections.Counter[str]()
    memory = list[float]()

    def resident() -> None:
        if pid is not None:
            memory.append(psutil.Process(pid).memory_info().rss / MIB)

    with (
        httpx.Client(timeout=600, limits=httpx.Limits(max_connections=num_threads)) as client,
        concurrent.futures.ThreadPoolExecutor(num_threads) as pool,
    ):

        def send(number: int) -> None:
            body, status = request(number, model=model)
            start = time.perf_counter()
            response = client.post(f"{url}/v1/chat/completions", json=body)
            spent = time.perf_counter() - start
            whole = not body["stream"] or response.text.endswith("data: [DONE]\n\n")
            if response.status_code != status or (status == 200 and not whole):
                wrong[f"{response.status_code} for {status}"] += 1
            elif status == 200:
                seconds.append(spent)

        list(pool.map(send, range(num_threads * 2)))  # caches and threads are there
        seconds.clear()
        resident()
        start = time.perf_counter()
        tenth = max(1, num_requests // 10)
        for first in range(0, num_requests, tenth):
            list(pool.map(send, range(first, min(first + tenth, num_requests))))
            resident()
    return Result(
        seconds=tuple(seconds),
        wrong=wrong,
        wall_s=time.perf_counter() - start,
        memory_mib=tuple(memory),
    )


@contextmanager
def toy_server(folder: Path) -> Iterator[tuple[str, int]]:
    """A toy behind `vico serve`: its address and its process id."""
    from megatron_vico import cpu_stand_in

    cpu_stand_in.install()
    from megatron_vico.config.schema import ParallelOptions
    from megatron_vico.parallel.groups import started
    from tests.hf_exports import export_hf
    from tests.toy_models import make_engine

    with started(ParallelOptions(), seed=0, timeout_minutes=1):
        engine = make_engine(folder)
        export_hf(
            folder / "flash",
            encoder=engine.encoder,
            language_model=engine.language_model,
            model=engine.model,
            layout="flash",
            tokenizer=engine.tokenizer,
        )
    words = ["serve", "--load", str(folder / "flash"), "--port", "0"]
    log = folder / "server.txt"
    with log.open("w") as said:
        server = subprocess.Popen(
            [sys.executable, "-m", "megatron_vico", *words], cwd=ROOT, stdout=said, stderr=said
        )
        try:
            while "running on" not in log.read_text():
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
            address = log.read_text().partition("running on ")[2].split()[0]
            yield address, server.pid
        finally:
            server.terminate()
            server.wait()


def main() -> None:
    """Print what a run came to; status 1 if a request was answered wrongly."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--url", help="of a server; unset, a toy's")
    parser.add_argument("--model", default="internvl", help="name before the @")
    parser.add_argument("--pid", type=int, help="of the server, for its memory")
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    asked = {"model": args.model, "num_requests": args.requests, "num_threads": args.threads}
    if args.url:
        result = load(args.url, pid=args.pid, **asked)
    else:
        with tempfile.TemporaryDirectory() as folder, toy_server(Path(folder)) as (url, pid):
            result = load(url, pid=pid, **asked)
    print(result)
    if args.out:
        figures = {"seconds": result.seconds, "wrong": dict(result.wrong)}
        figures |= {"wall_s": result.wall_s, "memory_mib": result.memory_mib}
        args.out.write_text(json.dumps(figures) + "\n")
    sys.exit(1 if result.wrong else 0)


if __name__ == "__main__":
    main()
