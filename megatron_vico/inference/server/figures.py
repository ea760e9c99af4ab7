"""What the server counts: Prometheus figures under vLLM's names, and a line of JSON a request."""

import json
import threading
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from megatron_vico.inference.server.engine_thread import EngineThread


class Figures:
    """Of `/metrics`; those of requests have the label `model_name`."""

    def __init__(self, thread: EngineThread) -> None:
        self.registry = CollectorRegistry()
        scheduler, engine = thread.scheduler, thread.engine
        room = engine.batch_size * engine.max_len
        for name, words, value in (
            ("num_requests_running", "Requests in the cache.", lambda: len(scheduler.running)),
            ("num_requests_waiting", "Requests in the queue.", lambda: len(scheduler.waiting)),
            ("kv_cache_usage_perc", "Share in use.", lambda: scheduler.cached_tokens / room),
        ):
            Gauge(f"vico:{name}", words, registry=self.registry).set_function(value)
        self._totals = {
            name: self._counter(name, words)
            for name, words in (
                ("prompt_tokens", "Tokens read, after compression."),
                ("generation_tokens", "Tokens said."),
                ("tiles", "Tiles seen."),
                ("compressed_tiles", "Tiles compressed."),
                ("visual_tokens", "Visual tokens read."),
            )
        }
        self._success = self._counter("request_success", "Requests answered.", "finished_reason")
        self._failed = self._counter("request_failed", "Requests refused or failed.", "status")
        self._seconds = {
            name: Histogram(f"vico:{name}_seconds", words, ["model_name"], registry=self.registry)
            for name, words in (
                ("time_to_first_token", "From the queue to the first token."),
                ("e2e_request_latency", "From the queue to the end."),
                ("request_queue_time", "In the queue."),
                ("request_prefill_time", "Reading the prompt."),
            )
        }

    def _counter(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(f"vico:{name}", words, ["model_name", *labels], registry=self.registry)

    def count(self, line: dict[str, Any], *, label: str, finish_reason: str | None) -> None:
        """A request that ended, by its line of the log."""
        if finish_reason is None:
            self._failed.labels(label, str(line["status"])).inc()
            return
        self._success.labels(label, finish_reason).inc()
        names = {"generation_tokens": "completion_tokens"}
        for name, total in self._totals.items():
            total.labels(label).inc(line[names.get(name, name)])
        seconds = line["seconds"]
        first = seconds["queue"] + seconds["encode"] + seconds["prefill"]
        for name, value in (
            ("time_to_first_token", first),
            ("e2e_request_latency", first + seconds["decode"]),
            ("request_queue_time", seconds["queue"]),
            ("request_prefill_time", seconds["prefill"]),
        ):
            self._seconds[name].labels(label).observe(value)


class RequestLog:
    """Lines that are whole, also where a server was killed; other servers may write there too."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("ab", buffering=0)
        self._lock = threading.Lock()

    def write(self, line: dict[str, Any]) -> None:
        """Add a line."""
        if self._file is not None:
            with self._lock:
                self._file.write(json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        """No more lines."""
        if self._file is not None:
            self._file.close()
