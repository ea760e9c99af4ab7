"""The language model split over context-parallel ranks equals the whole one: outputs and every
gradient."""

from tests.distributed.launch import launch

DENSE = ("toy", "toy-6b")


def test_context_parallel_ranks_equal_one_process_also_under_tensor_parallelism() -> None:
    printed = launch("context_parallel_ranks.py", num_processes=4)
    lines = [line.split() for line in printed.splitlines()]
    errors = {tuple(line[1:3]): line[3:] for line in lines if line[:1] == ["ERRORS"]}
    recomputed = {line[1]: line[3:] for line in lines if line[:1] == ["RECOMPUTE"]}
    controls = {line[1]: line[3:] for line in lines if line[:1] == ["CONTROL"]}
    layouts = ("TP2+SPxCP2", "TP2xCP2", "CP4", "CP2xDP2")
    assert errors.keys() == {(layout, name) for layout in layouts for name in DENSE} | {
        ("CP2xDP2", "toy-moe")
    }
    assert controls.keys() == set(layouts)
    assert recomputed.keys() == set(layouts)
    for each, values in (*errors.items(), *recomputed.items()):
        rows, leaf, weights = map(float, values)
        assert rows < 1e-5, each  # measured 1.2e-6
        assert leaf < 1e-5, each  # measured 1.4e-6
        assert weights < 1e-5, each  # measured 1.8e-6
    for layout, values in controls.items():  # right values, wrong gradients
        rows, leaf, weights = map(float, values)
        assert rows < 1e-5, layout
        assert leaf > 1e-2, layout  # measured 0.8
        assert weights > 1e-2, layout  # measured 0.9
