"""Our model of lmms-eval that serves itself; of the harness there is only what it is given."""

import importlib
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_vico.cli import serve
from tests.toy_models import make_engine
from tests.unit.inference.conftest import image_part


class Messages:
    def __init__(self, *, messages: Any) -> None:
        self.messages = messages

    def to_openai_messages(self, *, video_kwargs: dict[str, int]) -> Any:
        return self.messages


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """lmms_plugin.py, with a harness of plain records."""
    names: dict[str, dict[str, Any]] = {
        "lmms_eval.api.instance": dict.fromkeys(
            ("GenerationResult", "Instance", "TokenCounts"), SimpleNamespace
        ),
        "lmms_eval.api.model": {"lmms": object},
        "lmms_eval.models.registry_v2": {"ModelManifest": SimpleNamespace},
        "lmms_eval.protocol": {"ChatMessages": Messages},
    }
    for name, contents in names.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.delitem(sys.modules, "megatron_vico.lmms_plugin", raising=False)
    return importlib.import_module("megatron_vico.lmms_plugin")


def test_a_model_that_serves_itself(
    plugin: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    single_process_groups: None,
) -> None:
    toy = make_engine(tmp_path, batch_size=4)
    monkeypatch.setattr(serve, "refuse_incomplete", lambda path: None)
    monkeypatch.setattr(serve.Flags, "engine", lambda self: nullcontext(toy))
    monkeypatch.setattr(serve.Flags, "drawn", [])
    monkeypatch.setattr(serve.Flags, "model", toy.model)
    use = SimpleNamespace(max_dynamic_patch=4)
    monkeypatch.setattr(serve.Flags, "use", use)
    log = tmp_path / "log.jsonl"
    model = plugin.ViCOModel(
        model="toy@fastv",
        load=f"{tmp_path} --plans none,fastv --request-log {log}",
        num_concurrent=4,
        max_tiles="4",
    )
    documents = [f"What is {number}?" for number in range(6)]
    model.task_dict = {"t": {"test": documents}}

    def messages(document: str) -> list[dict[str, Any]]:
        content = [image_part(64, 32), {"type": "text", "text": document}]
        return [{"role": "user", "content": content}]

    given = {"max_new_tokens": 3, "do_sample": False}
    requests = [
        SimpleNamespace(args=("", messages, given, number, "t", "test")) for number in range(6)
    ]
    answers = model.generate_until(requests)
    model._served.close()
    rows = {row["id"]: row for row in map(json.loads, log.read_text().splitlines())}
    assert set(rows) == {f"t/test/{number}" for number in range(6)}
    for number, answer in enumerate(answers):
        row = rows[f"t/test/{number}"]
        assert isinstance(answer.text, str)
        assert answer.token_counts.input_tokens == row["prompt_tokens"]
        assert (row["plan"], row["tiles"], row["visual_tokens"]) == ("fastv", 3, 8)
