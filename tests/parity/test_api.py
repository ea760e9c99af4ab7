"""From Python a model routes and answers as the engine that was exported; examples/api.py runs."""

import io
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import megatron_vico
from megatron_vico.errors import ConfigError, SampleError
from tests.parity.remote_exports import (
    IMAGES,
    MAX_NEW_TOKENS,
    ROUTINGS,
    Exported,
    conversation,
    exported,  # noqa: F401
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("exported", [("toy", "toy")], indirect=True)
def test_a_model_routes_and_answers(exported: Exported, tmp_path: Path) -> None:  # noqa: F811
    sample = conversation(3)
    prompt = exported.engine.prompt(sample)
    routing = ROUTINGS["flash"]  # what the export says
    ((compressed_N, probability_N),) = exported.engine.route([prompt], routing)
    assert 0 < int(compressed_N.sum()) < len(compressed_N)
    (expected,) = exported.engine.answer([prompt], plan=routing, max_new_tokens=MAX_NEW_TOKENS)
    file = tmp_path / "image.png"
    file.write_bytes(sample.images[0])
    images = [file, Image.open(io.BytesIO(sample.images[1]))]
    questions = [turn.text for turn in sample.turns if turn.role == "human"]
    with megatron_vico.load_model(exported.flash) as model:
        found_N, found_probability_N = model.route(images)
        answers = model.ask(questions, images, max_new_tokens=MAX_NEW_TOKENS)
        kept = model.ask(questions[0], sample.images, plan="none", max_new_tokens=1)
        with pytest.raises(SampleError, match="cannot be decoded"):
            model.ask("?", [b"no image"])
    torch.testing.assert_close(found_probability_N, probability_N)
    assert found_N.tolist() == compressed_N.tolist() == answers.compressed_N.tolist()
    assert answers.texts == expected.texts
    assert not kept.compressed_N.any()
    with megatron_vico.load_model(exported.internvl) as model:
        assert not model.ask("?", images, max_new_tokens=1).compressed_N.any()
        with pytest.raises(ConfigError, match="no trained connector_16x and no trained vir"):
            model.route(images)


@pytest.mark.parametrize("exported", [("toy", "toy")], indirect=True)
def test_the_example(
    exported: Exported,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "page.png").write_bytes(conversation(0).images[0])
    words = [str(exported.flash), str(tmp_path / "page.png"), "What is it?"]
    monkeypatch.setattr(sys, "argv", ["api.py", *words])
    steps = runpy.run_path(str(ROOT / "examples" / "api.py"), run_name="__main__")
    losses = steps["consistency_steps"]()
    assert sum(losses[-20:]) < 0.2 * sum(losses[:20])
    out = capsys.readouterr().out
    assert "nats, after 200 steps" in out
    assert f" of {len(IMAGES[0]) * 5} tiles compressed: " in out


def test_the_surface_is_what_it_says() -> None:
    assert all(callable(getattr(megatron_vico, name)) for name in megatron_vico.__all__)
    assert all(name in str(megatron_vico.__doc__) for name in megatron_vico.__all__)
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        _ = megatron_vico.load_modle
