"""Figures about a trained model show the numbers they are given, through `vico plot`."""

import json

import numpy as np
import pytest

from megatron_vico.cli.main import main
from megatron_vico.errors import ConfigError
from megatron_vico.evaluation import figures
from megatron_vico.evaluation.runner import RowResult


def result(**compressed):
    kinds = compressed or {"dense": 0.1, "photo": 0.9}
    return {
        "row": "vico",
        "score": 0.9,
        "standard_error": 0.01,
        "score_by_kind": dict.fromkeys(kinds, 0.5),
        "num_questions_by_kind": dict.fromkeys(kinds, 1200),
        "compressed_by_kind": compressed,
        "num_tiles": 100,
        "num_compressed": 50,
        "num_visual_tokens": 250,
        "num_visual_tokens_uncompressed": 400,
    }


def test_content_has_a_bar_a_kind_in_order():
    (axes,) = figures.compression_by_content(
        RowResult(**result(photo=0.9, dense=0.1, chart=0.5))
    ).axes
    assert [bar.get_width() for bar in axes.patches] == [10, 50, 90]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0] == "dense\nscore 50.0, n = 1,200"
    assert axes.lines[0].get_xdata()[0] == 50
    with pytest.raises(ConfigError, match="ask one question a tile"):
        figures.compression_by_content(RowResult(**result()))


def test_the_window_is_drawn_with_its_threshold(tmp_path):
    rows = [
        {
            "iteration": step,
            "router_threshold": 2.0 + step,
            "router_ratio_p10": 0.5,
            "router_ratio_p50": 1.0,
            "router_ratio_p90": 50.0,
            "router_labelled_compress": 0.6,
        }
        for step in range(1, 9)
    ]
    lines = [*rows[:4], {"iteration": 4, "valid_loss": 1.0}, *rows[4:]]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    upper, lower = figures.ratio_window(path).axes
    median, threshold = upper.lines
    np.testing.assert_array_equal(median.get_ydata(), [1.0] * 8)
    np.testing.assert_array_equal(threshold.get_ydata(), np.arange(3.0, 11.0))
    np.testing.assert_array_equal(threshold.get_xdata(), np.arange(1, 9))
    assert upper.get_yscale() == "log"
    (labelled,) = lower.lines
    np.testing.assert_allclose(labelled.get_ydata(), 60.0)
    path.write_text('{"iteration": 1, "loss": 2.0}\n')
    with pytest.raises(ConfigError, match="give a run of the router stage"):
        figures.ratio_window(path)


def test_bubbles_are_as_large_as_models_and_joined_by_name():
    sizes = {"8B": 8.0, "38B": 38.0}
    bubbles = [
        figures.Bubble(name=name, score=80 + x, throughput=x, parameters_b=size, group=group)
        for name, size in sizes.items()
        for group, x in (("base", 1.0), ("ViCO", 2.0))
    ]
    (axes,) = figures.bubble_chart(bubbles).axes
    areas = [circle.get_sizes()[0] for circle in axes.collections]
    assert areas[0] == areas[1] < areas[2]
    assert [tuple(line.get_xdata()) for line in axes.lines] == [(1.0, 2.0)] * 2
    places = [tuple(circle.get_offsets()[0]) for circle in axes.collections]
    assert places == [(1.0, 81.0), (2.0, 82.0)] * 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["base", "ViCO"]


def test_vico_plot_draws_them(tmp_path, capsys):
    bubble = {"name": "8B", "score": 80, "throughput": 1, "parameters_b": 8, "group": "base"}
    files = {
        "content": result(dense=0.5),
        "bubble": [bubble],
        "bad": [{"name": "8B"}],
        "no": {"row": "vico"},
    }
    for name, contents in files.items():
        (tmp_path / name).write_text(json.dumps(contents))

    def plot(action, name):
        command = f"plot {action} {tmp_path / name} --output {tmp_path / 'out.png'}"
        return main(command.split()), capsys.readouterr().err

    assert plot("content", "content") == (0, "")
    assert plot("bubble", "bubble") == (0, "")
    assert (tmp_path / "out.png").stat().st_size > 1000
    for action, name, error in (
        ("bubble", "bad", "missing"),
        ("content", "no", "no 'score'"),
        ("content", "absent", "no such file"),
        ("window", "absent", "no such file"),
    ):
        status, shown = plot(action, name)
        assert (status, error in shown) == (2, True), shown
