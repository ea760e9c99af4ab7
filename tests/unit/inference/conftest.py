"""A server of a toy for the tests of `vico serve`."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megatron_vico.inference.engine import Engine
from megatron_vico.inference.plans import PlanSource, Routing, read_plan
from megatron_vico.inference.server.app import Server, ServerOptions
from megatron_vico.inference.server.chat import TileLimits
from megatron_vico.inference.server.models import Models
from tests.toy_models import make_engine

PLANS = ("vir", "none", "all", "random=0.55", "image")


def plan(name: str) -> PlanSource:
    return read_plan(name, routing=Routing(), num_layers=3)


@pytest.fixture(scope="session")
def served_engine(tmp_path_factory: pytest.TempPathFactory, single_process_groups: None) -> Engine:
    engine = make_engine(tmp_path_factory.mktemp("served"), batch_size=4)
    engine.max_len = 512
    return engine


@pytest.fixture
def make_server(served_engine: Engine, tmp_path: Path) -> Callable[..., Server]:
    """make_server(**options): a server, not yet started, that logs to `log.jsonl`."""

    def make(**options: Any) -> Server:
        fields = {"tiles": TileLimits(default=4), "request_log": tmp_path / "log.jsonl"}
        models = Models("internvl", PLANS, read_plan=plan)
        return Server(served_engine, models, ServerOptions(**fields | options))

    return make


def data_url(width: int, height: int, *, colour: str = "red") -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def image_part(width: int = 32, height: int = 32, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(width, height), **more}}


def body(*content: Any, model: str = "internvl@none", **fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": list(content) or "What is it?"}
    return {"model": model, "messages": [message], "max_tokens": 4, "temperature": 0} | fields
