"""The commands one after another, as a user runs them: train, checkpoint, convert, generate,
evaluate, plot, and the tool that draws what the router does."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from megatron_vico.cli.main import main
from megatron_vico.config.registry import MODELS, get_model_config
from megatron_vico.convert.convert import convert
from megatron_vico.convert.huggingface.config import ExportOptions, model_json
from tests.hf_exports import export_hf
from tests.toy_data import write_video
from tests.toy_models import make_encoder, make_language_model
from tests.training_runs import ToyData, load_tool, make_toy_data, toy_settings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ToyData:
    return make_toy_data(tmp_path_factory.mktemp("data"), num_samples=16)


def vico(command: str) -> int:
    """The status of `vico COMMAND`; no word of it may hold a space."""
    return main(command.split())


@pytest.fixture(scope="module")
def run(
    data: ToyData, tmp_path_factory: pytest.TempPathFactory, single_process_groups: None
) -> Path:
    """The --save folder of a short pretraining run, started as a user would, from a Flash model."""
    folder = tmp_path_factory.mktemp("runs") / "pretrain"
    recipe = folder.parent / "pretrain.yaml"
    model = get_model_config("toy")
    modules = {"encoder": make_encoder(model), "language_model": make_language_model(model)}
    flash = export_hf(folder.parent / "start", **modules, model=model, layout="flash")  # type: ignore[arg-type]
    convert(flash, output=folder.parent / "megatron", layout="megatron")
    own = {"stage": "pretrain", "pretrained_checkpoint": str(folder.parent / "megatron")}
    own |= {"lr": 4e-6, "min_lr": 1e-7, "train_iters": 5}  # answers stay those of the Flash model
    recipe.write_text(yaml.safe_dump(toy_settings(data) | own))
    assert vico(f"train --recipe {recipe} --train-iters 2 --save {folder}") == 0
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    folder = run.parent / "flash"
    words = f"--from megatron --to hf --layout flash --input {run} --output {folder} --verify"
    own = "--flash-decision-rule paper"
    assert vico(f"convert {words} {own}") == 0
    assert '"flash_decision_rule": "paper"' in (folder / "config.json").read_text()
    assert (folder / "modeling_internvl_chat.py").exists()
    return folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 32), "red").save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_train_leaves_a_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vico(f"checkpoint {run}") == 0
    shown = capsys.readouterr().out
    assert "model_size: toy" in shown
    assert "iteration: 2" in shown
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_generate_from_an_export(
    exported: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--load {exported} --image {image} --max-new-tokens 3"
    for plan, compressed in (("none", 0), ("all", 3), ("vir", None)):
        prompts = ["--prompt", "<image>\nwhat?", "--prompt", "and?"]
        assert main(["generate", *words.split(), *prompts, "--plan", plan]) == 0
        shown = capsys.readouterr().out
        assert "> and?" in shown
        if compressed is not None:
            tokens = 3 * 4 - 3 * compressed
            assert f"{compressed} of 3 tiles compressed, {tokens} visual tokens" in shown


def test_generate_shows_a_video_as_frames_of_one_tile(
    exported: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = write_video(tmp_path / "video.mp4", 20)
    words = f"generate --load {exported} --prompt what? --max-new-tokens 3 --plan none"
    assert vico(f"{words} --video {video} --num-frames 5") == 0
    shown = capsys.readouterr().out
    assert "0 of 5 tiles compressed, 20 visual tokens" in shown
    assert "> what?" in shown
    assert vico(f"{words} --num-frames 5") == 2
    with pytest.raises(SystemExit):
        vico(f"{words} --video {video} --image {image}")


def test_evaluate_writes_what_it_prints(
    exported: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    line = {"id": "a", "image": image.name, "conversations": turns, "metrics": ["exact"]}
    jsonl, output = tmp_path / "set.jsonl", tmp_path / "out.json"
    jsonl.write_text(json.dumps(line) + "\n")
    words = f"--plan all --max-new-tokens 2 --output {output}"
    assert vico(f"evaluate --load {exported} --jsonl {jsonl} {words}") == 0
    assert "1 conversations: score" in capsys.readouterr().out
    written = json.loads(output.read_text())
    shares = written["compressed_tiles"], written["visual_token_reduction"]
    assert (written["row"], shares) == ("all", (1.0, 0.75))
    # What was decided once is decided again.
    kept = tmp_path / "plans.jsonl"
    again = f"evaluate --load {exported} --jsonl {jsonl} --max-new-tokens 2"
    assert vico(f"{again} --plan random=0.5 --write-plans {kept}") == 0
    (image,) = json.loads(kept.read_text())["images"]
    shown = capsys.readouterr().out.splitlines()[-1]
    assert vico(f"{again} --plan replay --replay {kept}") == 0
    assert capsys.readouterr().out.splitlines()[-1] == shown
    assert (image["tiles"], image["compressed_tiles"]) == (3, image["plan"].count("1"))
    assert image["compressed_tiles"] in (1, 2)


def test_generate_draws_stops_and_thinks(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"--load {exported} --prompt what? --max-new-tokens 12 --plan none --temperature 1.5"
    found = []
    for more in ("--seed 1", "--seed 1", "--seed 2", "--seed 1 --thinking"):
        assert vico(f"generate {words} {more}") == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]
    assert len({*found}) == 3
    stop = found[0].split("\n")[1][2:4]
    assert main(["generate", *words.split(), "--seed", "1", "--stop", stop]) == 0
    assert capsys.readouterr().out.split("\n")[1] == found[0].split("\n")[1].partition(stop)[0]


def test_the_router_of_every_image_is_drawn(
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tool, picture = load_tool("visualize_routing"), tmp_path / "routing.png"
    images = []
    for size in ((96, 32), (64, 64)):  # 3 tiles and 2x2 tiles, and a thumbnail each
        noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        images.append(str(tmp_path / f"{size[0]}.png"))
        Image.fromarray(noise).save(images[-1])

    def draw(load: Path, *words: str) -> int:
        command = f"tool --load {load} --output {picture} {' '.join(words)}"
        monkeypatch.setattr(sys, "argv", command.split())
        status: int = tool.main()
        return status

    assert draw(exported, "--tile-px 50 --columns 2", *images) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" of ")[1] for line in lines] == ["4 tiles compressed", "5 tiles compressed"]
    assert Image.open(picture).width == 12 + 2 * (3 * 52 - 2 + 12)
    assert draw(exported, "--layout 1x3 --max-dynamic-patch 3", *images) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" of ")[1] for line in lines] == ["4 tiles compressed"] * 2
    for load, image, message in (
        (exported, "gone.png", "gone.png: No such file"),
        (tmp_path, images[0], str(tmp_path)),
        (exported, f"--layout 3x4 {images[0]}", "give --max-dynamic-patch 12"),
        (exported, f"--layout 3 {images[0]}", "--layout 3: expected rows x columns"),
    ):
        assert draw(load, image) == 2
        assert message in capsys.readouterr().err


def test_plot(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vico(f"plot loss pretrain={run} --output {tmp_path / 'loss.png'}") == 0
    assert Image.open(tmp_path / "loss.png").width > 100
    shares = {"retention": 1.0, "compressed_tiles": 0.5, "visual_token_reduction": 0.375}
    (tmp_path / "results.json").write_text(json.dumps([{"row": "vico", "score": 0.5, **shares}]))
    assert vico(f"plot table {tmp_path / 'results.json'} --format markdown") == 0
    assert "| ViCO |" in capsys.readouterr().out


def test_plot_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"plot trace {tmp_path} --output {tmp_path / 'step.png'}"
    assert vico(command) == 2
    message = "no rank_*.json; give <save>/trace/step_N of a run with --profile"
    assert message in capsys.readouterr().err
    name = "policy forward pack 0 chunk 0"
    events = [{"cat": "user_annotation", "name": name, "ts": 0.0, "dur": 9.0}]
    (tmp_path / "rank_0000.json").write_text(json.dumps({"traceEvents": events}))
    assert vico(command) == 0
    assert Image.open(tmp_path / "step.png").width > 100


def test_check_needs_neither_gpu_nor_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    words = "train --model-size internvl3_5-8b --tensor-model-parallel-size 2 --check --world-size"
    assert vico(f"{words} 32") == 0
    shown = capsys.readouterr().out
    layout = "tensor 2 x pipeline 1 x context 1 x data 16"
    assert f"OK: stage consistency of internvl3_5-8b on 32 ranks: {layout}" in shown
    assert "the trainer" not in shown
    assert vico(f"{words} 31") == 2
    assert "use 30 or 32 ranks" in capsys.readouterr().err
    assert vico(f"{words} 32 --bf16 --fp8-format hybrid") == 0
    assert vico("train --check files") == 2
    assert "--data-path is not set" in capsys.readouterr().err


def test_check_takes_the_size_from_the_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, size in (
        (f"--pretrained-checkpoint {run}", "toy"),
        ("--model-size toy-moe", "toy-moe"),
        (f"--model-size {tmp_path}", "internvl3_5-1b"),
    ):
        config = model_json(
            MODELS["internvl3_5-1b"], layout="hf", dtype="bfloat16", options=ExportOptions()
        )
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert vico(f"train --check {words}") == 0
        assert f"OK: stage consistency of {size} on" in capsys.readouterr().out
