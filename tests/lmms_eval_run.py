"""The real lmms-eval, in its own environment and offline, against `vico serve` of a toy: 20 samples
of a local task. `make test-eval`; never its exit status alone, which is 0 after a traceback too."""

import base64
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
from PIL import Image

from megatron_vico.cli.main import main
from megatron_vico.config.registry import get_model_config
from tests.hf_exports import export_hf
from tests.toy_models import make_encoder, make_language_model
from tests.training_runs import make_toy_data

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-eval" / "bin" / "python"
SAMPLES, WRONG = 20, 3
TASK = """task: toy_vico
dataset_path: json
dataset_kwargs: {{data_files: {{test: {jsonl}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
process_results: !function utils.process_results
generation_kwargs: {{max_new_tokens: 6, temperature: 0}}
metric_list:
  - {{metric: hit, aggregation: mean, higher_is_better: true}}
metadata: [{{version: 0.0}}]
"""
UTILS = """
from PIL import Image


def doc_to_visual(doc):
    return [Image.open(doc["image"])]


def process_results(doc, results):
    return {"hit": float(results[0].strip() == doc["answer"].strip())}
"""


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, single_process_groups: None
) -> Iterator[tuple[str, Path]]:
    """Address and request log of `vico serve`."""
    folder = tmp_path_factory.mktemp("served")
    model = get_model_config("toy")
    modules = {"encoder": make_encoder(model), "language_model": make_language_model(model)}
    flash = export_hf(folder / "flash", **modules, model=model, layout="flash")  # type: ignore[arg-type]
    tokenizer, log = make_toy_data(folder / "data").tokenizer, folder / "requests.jsonl"
    words = f"serve --load {flash} --tokenizer-model {tokenizer} --port 0 --request-log {log}"
    words += " --max-dynamic-patch 4 --max-model-len 512 --plans vir none all random=0.5"
    with (folder / "server.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_vico", *words.split()],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        try:
            while (
                found := re.search(r"http://\S+:\d+", (folder / "server.txt").read_text())
            ) is None:
                assert process.poll() is None, (folder / "server.txt").read_text()
            yield f"{found[0]}/v1", log
        finally:
            process.terminate()
            process.wait(60)


def make_task(folder: Path, address: str) -> None:
    """Twenty images; 17 accepted answers are what the server says, without a harness, under vir."""
    client = openai.OpenAI(base_url=address, api_key="none")
    random, lines = np.random.default_rng(0), []
    for number in range(SAMPLES):
        path = folder / f"{number}.png"
        size = (32 * int(random.integers(1, 5)), 32)
        mode = ("RGB", "L", "RGBA")[number % 3]
        noise = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).convert(mode).save(path)
        url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        question = f"what is number {number}?"
        parts = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": question},
        ]
        said = client.chat.completions.create(
            model="internvl@vir",
            messages=[{"role": "user", "content": parts}],  # type: ignore[list-item,misc]
            max_tokens=6,
            temperature=0,
        )
        answer = (said.choices[0].message.content or "") if number >= WRONG else "nothing of this"
        lines.append({"image": str(path), "question": question, "answer": answer})
    (folder / "toy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "toy_vico.yaml").write_text(TASK.format(jsonl=folder / "toy.jsonl"))
    (folder / "utils").with_suffix(".py").write_text(UTILS)


def run_harness(folder: Path, client: str, model: str, address: str) -> dict:
    """results.json of one run."""
    out = folder / "out" / client
    arguments = f"model={model},base_url={address},num_concurrent=8"
    words = ["--model", client, "--model_args", arguments, "--tasks", "toy_vico", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        [PYTHON, "-m", "lmms_eval", *words, "--include_path", folder, "--output_path", out],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | offline | {"HF_HOME": str(folder / "hf")},
        check=False,
        timeout=600,
    )
    found = list((out / model).glob("*_results.json"))
    assert len(found) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    results: dict = json.loads(found[0].read_text())
    assert results["n-samples"]["toy_vico"] == {"original": SAMPLES, "effective": SAMPLES}
    (samples,) = (out / model).glob("*_samples_toy_vico.jsonl")
    assert "LMMS_EVAL_REQUEST_FAILED" not in samples.read_text()
    assert len(samples.read_text().splitlines()) == SAMPLES
    return results


def test_lmms_eval_scores_the_served_toy(
    server: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address, log = server
    make_task(tmp_path, address)
    log.write_text("")  # of the questions above
    models = [f"internvl@{plan}" for plan in ("none", "vir", "all")]
    for model in models:
        results = run_harness(tmp_path, "vico", model, address)
        if model == "internvl@vir":
            assert results["results"]["toy_vico"]["hit,none"] == 1 - WRONG / SAMPLES
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(requests) == 3 * SAMPLES
    assert {request["status"] for request in requests} == {200}
    ids = {f"toy_vico/test/{number}" for number in range(SAMPLES)}
    assert {request["id"] for request in requests} == ids

    def total(plan: str, key: str) -> int:
        return sum(each[key] for each in requests if each["model"] == f"internvl@{plan}")

    tiles, compressed = total("vir", "tiles"), total("vir", "compressed_tiles")
    assert (total("none", "compressed_tiles"), total("all", "compressed_tiles")) == (0, tiles)
    # The same ratio from what clients are told: three of a compressed tile's four tokens go.
    saved = total("none", "prompt_tokens") - total("vir", "prompt_tokens")
    most = total("none", "prompt_tokens") - total("all", "prompt_tokens")
    assert (saved, most) == (3 * compressed, 3 * tiles)

    run_harness(tmp_path, "openai", "internvl@random=0.5", address)  # the stock client
    rows = [f"{model.partition('@')[2]}={model}" for model in (*models, "internvl@random=0.5")]
    words = ["--results", str(tmp_path / "out"), "--log", str(log), "--format", "json"]
    assert main(["table", "own", *rows, *words, "--columns", "toy_vico:hit"]) == 0
    table = {row["title"]: row["scores"]["toy_vico"] for row in json.loads(capsys.readouterr().out)}
    assert table["vir"]["compressed_by_tile"] == pytest.approx(compressed / tiles)
    assert table["vir"]["score"] == pytest.approx(100 * (1 - WRONG / SAMPLES))
    assert {row["samples"] for row in table.values()} == {SAMPLES}
    assert 0.3 < table["random=0.5"]["compressed_by_tile"] < 0.7
