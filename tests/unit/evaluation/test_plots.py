"""Curves show what the files hold."""

import json

import numpy as np

from megatron_vico.evaluation import plots


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_metrics_tolerate_missing_keys_and_a_broken_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first, second = {"iteration": 1, "loss": 2.0, "note": "text"}, {"loss": 1.0, "tau": 3.0}
    write_lines(path, [first, second])
    path.write_text(path.read_text() + '{"iteration": 3, "lo')
    metrics = plots.read_metrics(path)
    assert sorted(metrics) == ["iteration", "loss", "tau"]
    np.testing.assert_array_equal(metrics["loss"], [2.0, 1.0])
    np.testing.assert_array_equal(metrics["tau"], [np.nan, 3.0])


def test_loss_curves_draw_each_file(tmp_path):
    files = {}
    for name, scale in (("pretrain", 1.0), ("warm-up", 0.1), ("empty", 0.0)):
        path = files[name] = tmp_path / f"{name}.jsonl"
        losses = [{"iteration": i, "loss": scale / i} for i in range(1, 101)]
        write_lines(path, losses if scale else [{"iteration": 1}])
    figure = plots.loss_curves(files, columns=2)
    titles = [panel.get_title() for panel in figure.axes]
    assert titles[:3] == ["pretrain", "warm-up", "empty"]
    raw, smooth = figure.axes[0].lines
    np.testing.assert_array_equal(raw.get_ydata(), [1 / i for i in range(1, 101)])
    assert len(smooth.get_ydata()) == 96  # mean of 5 steps
    assert not figure.axes[2].lines


def test_validation_is_drawn_as_points_between_the_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    steps = [{"iteration": step, "loss": 1 / step} for step in range(1, 5)]
    valid = [{"iteration": 2, "valid_loss": 0.7}, {"iteration": 4, "valid_loss": 0.6}]
    lines = [*steps[:2], valid[0], *steps[2:], valid[1]]
    write_lines(path, lines)
    (panel,) = plots.loss_curves({"warm-up": path}).axes
    points, raw, _ = panel.lines
    drawn = zip(points.get_xdata(), points.get_ydata(), strict=True)
    assert [pair for pair in drawn if not np.isnan(pair[1])] == [(2, 0.7), (4, 0.6)]
    np.testing.assert_array_equal(raw.get_ydata(), [1, 1 / 2, 1 / 3, 1 / 4])
    assert panel.get_yscale() == "log"


def make_box(rank, model, kind, start_ms, end_ms, *, pack=None, chunk=None):
    return plots.TraceBox(
        rank=rank, model=model, kind=kind, pack=pack, chunk=chunk, start_ms=start_ms, end_ms=end_ms
    )


def two_ranks():
    return [
        make_box(0, "encode", "phase", 0, 5),
        make_box(0, "reference", "forward", 10, 20, pack=0, chunk=0),
        make_box(1, "reference", "forward", 20, 40, pack=0, chunk=0),
        make_box(0, "policy", "forward", 25, 35, pack=0, chunk=0),
        make_box(1, "policy", "forward", 40, 40.5, pack=7, chunk=0),
        make_box(1, "policy", "loss", 50, 60, pack=7, chunk=0),
        make_box(1, "policy", "backward", 60, 100, pack=7, chunk=0),
    ]


def write_trace(path, names, *, start_us, category="user_annotation"):
    """Ranges of 0.5 ms, 1 ms apart, as torch.profiler exports them."""
    events = [
        {"ph": "X", "cat": category, "name": name, "ts": start_us + 1000 * index, "dur": 500.0}
        for index, name in enumerate(names)
    ]
    trace = {"baseTimeNanoseconds": 10**18, "traceEvents": [{"ph": "M"}, *events]}
    path.write_text(json.dumps(trace))


def test_the_last_step_is_read_from_the_files_of_all_ranks(tmp_path):
    span = "policy (one) forward pack {} chunk 1"
    before = ["ProfilerStep#9", span.format(9), "ProfilerStep#10"]
    names = [*before, span.format(0), "Optimizer.step#Adam"]
    write_trace(tmp_path / "rank_0000.json", names, start_us=2000)
    write_trace(tmp_path / "rank_0001.json", [*before, "phase: encode"], start_us=0)
    assert plots.read_trace(tmp_path) == [
        make_box(1, "encode", "phase", 0.0, 0.5),
        make_box(0, "policy (one)", "forward", 2.0, 2.5, pack=0, chunk=1),
    ]
    assert plots.read_trace(tmp_path / "nowhere") == []


def test_a_gpu_trace_shows_when_kernels_ran(tmp_path):
    name = "policy backward pack 3 chunk 0"
    file = tmp_path / "rank_0000.json"
    write_trace(file, [name], start_us=0, category="gpu_user_annotation")
    trace = json.loads(file.read_text())
    trace["traceEvents"].append({"cat": "user_annotation", "name": name, "ts": 0.0, "dur": 10.0})
    file.write_text(json.dumps(trace))
    box = make_box(0, "policy", "backward", 0.0, 0.5, pack=3, chunk=0)
    assert plots.read_trace(tmp_path) == [box]


def test_a_trace_picture_has_a_box_for_each_span_and_marks_the_overlap():
    boxes = two_ranks()
    (axes,) = plots.trace_picture(boxes, title="a step").axes
    drawn = [
        (patch.get_y() + 0.4, patch.get_x(), patch.get_x() + patch.get_width())
        for patch in axes.patches
    ]
    assert drawn == [(box.rank, box.start_ms, box.end_ms) for box in boxes]
    colours = {
        (box.model, box.kind): patch.get_facecolor()
        for box, patch in zip(boxes, axes.patches, strict=True)
    }
    assert len(set(colours.values())) == len(colours) == 5
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rank 0", "rank 1"]
    # First policy forward, last reference forward.
    assert [line.get_xdata()[0] for line in axes.lines] == [25, 40]
    (axes,) = plots.trace_picture([box for box in boxes if box.model != "reference"]).axes
    assert not axes.lines


def test_packs_are_named_where_there_is_room():
    (axes,) = plots.trace_picture(two_ranks()).axes
    shown = [text.get_text() for text in axes.texts if text.get_text()]
    assert shown[:4] == ["0", "0", "0", "7"]  # that of 0.5 ms has none
    assert len(shown) == 6  # and two for the lines

    chunks = [make_box(0, "policy (one)", "forward", at, at + 1, pack=3, chunk=at) for at in (0, 1)]
    (axes,) = plots.trace_picture(chunks).axes
    assert [text.get_text() for text in axes.texts] == ["3a", "3b"]
