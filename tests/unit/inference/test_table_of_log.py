"""`vico table` on the request log of a server: the real lines, with results of a harness."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from megatron_vico.inference.server.app import Server
from tests.unit.evaluation.test_paper_tables import Site
from tests.unit.inference.conftest import body, image_part
from tests.unit.inference.test_server import CHAT, lines


def test_rows_of_a_served_toy(
    make_server: Callable[..., Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {f"internvl@{plan}": 0.5 for plan in ("none", "fastv", "all", "vir")}
    with TestClient(make_server().app) as client:
        for model in models:
            for number in range(3):
                asked = body(image_part(32 * (1 + number), 32), {"text": "?"}, model=model)
                headers = {"x-request-id": f"ai2d/test/{number}"}
                found = client.post(CHAT, json=asked, headers=headers)
                assert found.status_code == 200, found.text
    logged, site = lines(tmp_path), Site(tmp_path)
    site.log = tmp_path / "log.jsonl"
    for model, score in models.items():
        own = [line for line in logged if line["model"] == model]
        site.lmms(model, "ai2d", {"exact_match,none": score}, own)
    names = ("vanilla", "fastv", "all_compress", "vico")
    rows = [f"{name}={model}" for name, model in zip(names, models, strict=True)]
    assert site.table("3", *rows) == 0
    vanilla, fastv, every, vico = (
        row["scores"]["AI2D"] for row in json.loads(capsys.readouterr().out)
    )
    num_tiles = 1 + 3 + 4  # 1, 2 and 3 tiles; of several, and a thumbnail
    assert vanilla["tiles"] == num_tiles
    assert vanilla["visual_tokens"] == 4 * num_tiles
    # A third of the layers has all tokens, two thirds half of them; rounded for each request.
    assert fastv["visual_tokens"] == sum(round(n * 2 / 3) for n in (4, 12, 16))
    assert fastv["compressed_tiles"] == 0
    assert (every["compressed_by_tile"], every["visual_tokens"]) == (1.0, num_tiles)
    assert vico["visual_tokens"] == 4 * num_tiles - 3 * vico["compressed_tiles"]
