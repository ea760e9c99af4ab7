"""The language model split over tensor-parallel ranks equals the whole one: logits and every
gradient."""

from tests.distributed.launch import launch


def test_two_tensor_parallel_ranks_with_and_without_sequence_parallelism_equal_one_process() -> (
    None
):
    printed = launch("language_model_layouts.py", num_processes=2)
    lines = [line.split()[1:] for line in printed.splitlines() if line.startswith("ERRORS")]
    assert [tuple(line[:2]) for line in lines] == [
        (name, sequence_parallel)
        for name in ("toy", "toy-6b")
        for sequence_parallel in ("False", "True")
    ]
    for line in lines:
        logits, leaf, weights = map(float, line[2:])
        assert logits < 1e-5, line  # measured 6e-7
        assert leaf < 1e-5, line  # measured 1.5e-6
        assert weights < 1e-5, line  # measured 1.7e-6
