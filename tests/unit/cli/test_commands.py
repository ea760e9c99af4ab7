"""The commands one after another, as a user runs them: train, checkpoint, convert, generate,
evaluate, plot."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from megatron_vico.cli.main import main
from tests.toy_data import write_video
from tests.training_runs import ToyData, make_toy_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ToyData:
    return make_toy_data(tmp_path_factory.mktemp("data"), num_samples=16)


@pytest.fixture(scope="module")
def run(
    data: ToyData, tmp_path_factory: pytest.TempPathFactory, single_process_groups: None
) -> Path:
    """The --save folder of a short pretraining run, started as a user would."""
    folder = tmp_path_factory.mktemp("runs") / "pretrain"
    recipe = folder.parent / "pretrain.yaml"
    settings = {
        "stage": "pretrain",
        "data_path": [str(data.shards)],
        "tokenizer_model": str(data.tokenizer),
        "seq_length": 600,
        "max_tiles_per_pack": 40,
        "max_samples_per_pack": 4,
        "max_dynamic_patch": 4,
        "num_workers": 0,
        "global_batch_size": 2,
        "train_iters": 5,
    }
    recipe.write_text(yaml.safe_dump(settings))
    assert (
        main(["train", "--recipe", str(recipe), "--train-iters", "2", "--save", str(folder)]) == 0
    )
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, data: ToyData) -> Path:
    folder = run.parent / "flash"
    words = (
        f"--from megatron --to hf --layout flash --input {run} --output {folder} --verify".split()
    )
    assert (
        main(
            [
                "convert",
                *words,
                "--tokenizer-model",
                str(data.tokenizer),
                "--flash-decision-rule",
                "paper",
            ]
        )
        == 0
    )
    assert '"flash_decision_rule": "paper"' in (folder / "config.json").read_text()
    assert (folder / "modeling_internvl_chat.py").exists()
    return folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.new("RGB", (64, 32), "red").save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_train_leaves_a_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "model_size: toy" in shown
    assert "iteration: 2" in shown
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_train_refuses_a_layout_it_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--tensor-model-parallel-size", "2"]) == 2
    assert capsys.readouterr().err.startswith(
        "ConfigError: world size 1 is not a multiple of tensor 2"
    )


def test_generate_from_an_export(
    exported: Path, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--load",
        str(exported),
        "--image",
        str(image),
        "--max-dynamic-patch",
        "4",
        "--max-new-tokens",
        "3",
    ]
    for plan, compressed in (("none", 0), ("all", 3), ("vir", None)):
        assert (
            main(
                [
                    "generate",
                    *words,
                    "--prompt",
                    "<image>\nwhat?",
                    "--prompt",
                    "and?",
                    "--plan",
                    plan,
                ]
            )
            == 0
        )
        shown = capsys.readouterr().out
        assert "> and?" in shown
        if compressed is not None:
            tokens = 3 * 4 - 3 * compressed
            assert f"{compressed} of 3 tiles compressed, {tokens} visual tokens" in shown


def test_generate_shows_a_video_as_frames_of_one_tile(
    exported: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = write_video(tmp_path / "video.mp4", 20)
    words = [
        "generate",
        "--load",
        str(exported),
        "--prompt",
        "what?",
        "--max-new-tokens",
        "3",
        "--plan",
        "none",
    ]
    assert main([*words, "--video", str(video), "--num-frames", "5"]) == 0
    shown = capsys.readouterr().out
    assert "0 of 5 tiles compressed, 20 visual tokens" in shown
    assert "> what?" in shown
    for wrong in (["--video", str(video), "--image", str(image)], ["--num-frames", "5"]):
        with pytest.raises(SystemExit):
            main([*words, *wrong])


def test_evaluate_writes_what_it_prints(
    exported: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}]
    line = {"id": "a", "image": image.name, "conversations": turns, "metrics": ["exact"]}
    (tmp_path / "set.jsonl").write_text(json.dumps(line) + "\n")
    words = [
        "--load",
        str(exported),
        "--jsonl",
        str(tmp_path / "set.jsonl"),
        "--plan",
        "all",
        "--max-new-tokens",
        "2",
    ]
    assert (
        main(
            ["evaluate", *words, "--max-dynamic-patch", "4", "--output", str(tmp_path / "out.json")]
        )
        == 0
    )
    assert "1 conversations: score" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["row"], written["compressed_tiles"], written["visual_token_reduction"]) == (
        "all",
        1.0,
        0.75,
    )


def test_plot(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "loss", f"pretrain={run}", "--output", str(tmp_path / "loss.png")]) == 0
    assert Image.open(tmp_path / "loss.png").width > 100
    row = {
        "row": "vico",
        "score": 0.5,
        "retention": 1.0,
        "compressed_tiles": 0.5,
        "visual_token_reduction": 0.375,
    }
    (tmp_path / "results.json").write_text(json.dumps([row]))
    assert main(["plot", "table", str(tmp_path / "results.json"), "--format", "markdown"]) == 0
    assert "| ViCO |" in capsys.readouterr().out


def test_plot_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plot", "trace", str(tmp_path), "--output", str(tmp_path / "step.png")]
    assert main(words) == 2
    assert (
        "no rank_*.json; give <save>/trace/step_N of a run with --profile"
        in capsys.readouterr().err
    )
    name = "policy forward pack 0 chunk 0"
    events = [{"cat": "user_annotation", "name": name, "ts": 0.0, "dur": 9.0}]
    (tmp_path / "rank_0000.json").write_text(json.dumps({"traceEvents": events}))
    assert main(words) == 0
    assert Image.open(tmp_path / "step.png").width > 100


def test_print_config_is_a_recipe_of_the_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model-size", "internvl3_5-8b", "--lr", "1e-5", "--no-rope-fusion"]
    assert main(["train", *words, "--print-config"]) == 0
    first = capsys.readouterr().out
    (tmp_path / "recipe.yaml").write_text(first)
    assert main(["train", "--recipe", str(tmp_path / "recipe.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == first


def test_check_needs_neither_gpu_nor_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "train",
        "--model-size",
        "internvl3_5-8b",
        "--tensor-model-parallel-size",
        "2",
        "--check",
    ]
    assert main([*words, "--world-size", "32"]) == 0
    shown = capsys.readouterr().out
    assert (
        "OK: stage consistency of internvl3_5-8b on 32 ranks: tensor 2 x pipeline 1 x context 1 x"
        " data 16" in shown
    )
    assert "the trainer" not in shown
    assert main([*words, "--world-size", "31"]) == 2
    assert "use 30 or 32 ranks" in capsys.readouterr().err
    assert main([*words, "--world-size", "32", "--bf16", "--fp8-format", "hybrid"]) == 0
    assert (
        "note: --fp8-format hybrid: checked by `vico train --check`, but not trained"
        in capsys.readouterr().out
    )
    assert main(["train", "--check", "files"]) == 2
    assert "--data-path is not set" in capsys.readouterr().err
