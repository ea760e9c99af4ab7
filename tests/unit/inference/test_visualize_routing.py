"""The routing tool: any image, any checkpoint form; errors are one line."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_vico.config.registry import get_model_config
from megatron_vico.config.schema import ParallelOptions
from megatron_vico.convert import convert
from megatron_vico.data.encode.tokenizer import load_tokenizer, train_sentencepiece
from megatron_vico.models.build import (
    build_language_model,
    build_vision_encoder,
    language_transformer_config,
    vision_transformer_config,
)
from megatron_vico.parallel import groups as process_groups

TOOL = Path(__file__).resolve().parents[3] / "tools" / "visualize_routing.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("visualize_routing", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def flash(single_process_groups, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flash")
    tokenizer = load_tokenizer(
        train_sentencepiece(["some text"] * 20, model_prefix=folder / "toy", vocab_size=300)
    )
    model = get_model_config("toy")
    with process_groups.started(ParallelOptions(), seed=0, timeout_minutes=1) as groups:
        encoder = build_vision_encoder(
            model, vision_transformer_config(model), pg_collection=groups.encoder
        )
        language_model = build_language_model(
            model, language_transformer_config(model), attention="sdpa"
        )
    return convert.export_hf(
        folder / "export",
        encoder=encoder,
        language_model=language_model,
        model=model,
        layout="flash",
        tokenizer=tokenizer,
    )


def call(tool, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["visualize_routing.py", *map(str, words)])
    return tool.main()


def test_every_image_is_routed_and_drawn(tool, flash, monkeypatch, tmp_path, capsys):
    sizes = {"wide.png": (96, 32), "square.png": (64, 64)}
    for name, (width, height) in sizes.items():
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / name)
    picture = tmp_path / "routing.png"
    images = [tmp_path / name for name in sizes]
    words = [
        "--load",
        flash,
        "--output",
        picture,
        "--max-dynamic-patch",
        4,
        "--tile-px",
        50,
        "--columns",
        2,
        *images,
    ]
    assert call(tool, monkeypatch, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    # 3 tiles and 2x2 tiles, and a thumbnail each.
    assert [line.split(" of ")[1] for line in lines] == ["4 tiles compressed", "5 tiles compressed"]
    width, _ = Image.open(picture).size
    assert width == 12 + 2 * (3 * 52 - 2 + 12)


def test_a_missing_image_is_named(tool, flash, monkeypatch, tmp_path, capsys):
    status = call(
        tool, monkeypatch, "--load", flash, "--output", tmp_path / "x.png", tmp_path / "gone.png"
    )
    assert status == 2
    assert "gone.png: No such file" in capsys.readouterr().err


def test_a_missing_checkpoint_is_named(tool, monkeypatch, tmp_path, single_process_groups, capsys):
    status = call(
        tool, monkeypatch, "--load", tmp_path, "--output", tmp_path / "x.png", tmp_path / "a.png"
    )
    assert status == 2
    assert str(tmp_path) in capsys.readouterr().err
