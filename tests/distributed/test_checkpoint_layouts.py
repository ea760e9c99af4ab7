"""A training checkpoint saved under any layout resumes under any other: weights, moments, masters
and step count."""

from pathlib import Path
from typing import Any

import pytest

from megatron_vico.checkpoint import run_folder, training_checkpoint
from megatron_vico.config.schema import ParallelOptions
from megatron_vico.parallel.groups import started
from tests.checkpoint_runs import make_training
from tests.distributed.global_weights import gather_weights
from tests.distributed.launch import on_ranks
from tests.distributed.layouts_checkpoint import CASES, difference, model_of, run_cases, step

PAIRS = [(case, layout) for case in CASES for layout in case.loaded_under]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each rank of four found, and checkpoints in the folder."""
    return on_ranks(run_cases, folder, num_ranks=4)


@pytest.mark.parametrize(("case", "layout"), PAIRS, ids=lambda each: getattr(each, "name", each))
def test_the_next_step_is_that_of_the_uninterrupted_run(
    case: Any, layout: str, found: list[dict[str, Any]]
) -> None:
    for rank in found:
        assert rank[case.name][layout]["weights"] == 0.0  # every layout, bit for bit
        assert rank[case.name][layout]["norm"] < 1e-6  # measured 2e-8: the order of the sum


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_process_resumes_what_four_wrote(
    case: Any, folder: Path, found: list[dict[str, Any]], single_process_groups: None
) -> None:
    with started(ParallelOptions(), seed=1, timeout_minutes=1) as groups:
        one = make_training(
            model_of(case.model),
            groups=groups,
            seed=2,
            dtype=case.dtype,
            optimizer=case.optimizer,
            clip_grad=0.0,
        )
        assert one.load(folder / case.name) == {"iteration": 2}
        step(one, groups, 3)
        assert (
            difference(found[0]["third steps"][case.name], gather_weights(one.modules, groups)) == 0
        )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reading_needs_no_layout(case: Any, found: list[dict[str, Any]]) -> None:
    """What tools read, one tensor after the other: convert/megatron/reader.py."""
    assert all(rank[case.name]["read without a layout"]["weights"] == 0.0 for rank in found)


def test_without_the_optimizers_state_the_steps_differ(found: list[dict[str, Any]]) -> None:
    """That the test above can fail."""
    for rank in found:
        assert rank["without optimizer"]["before"] == 0.0
        assert rank["without optimizer"]["after"] > 1e-2


def test_what_does_not_fit_is_refused_on_every_rank(found: list[dict[str, Any]]) -> None:
    for rank in found:
        told = rank["refusals"]
        assert "is of toy-6b, this run is of toy; set --model-size" in told["another size"]
        assert "layer_norm_weight is (4, 48), the model's is (8, 48)" in told["more layers"]
        assert (
            "has the state of a distributed optimizer, this run's is replicated"
            in told["another optimizer"]
        )
        assert "--pretrained-checkpoint" in told["another optimizer"]
        assert told == found[0]["refusals"]


def test_every_rank_is_told_of_a_full_disk(folder: Path, found: list[dict[str, Any]]) -> None:
    for rank in found:
        in_tensors, in_pointer = rank["full disk"]["told"]
        assert "last good checkpoint is" in in_tensors
        assert "iter_0000001" in in_tensors
        assert "No space left on device" in in_pointer
        assert rank["full disk"]["latest"] == 1
        assert "iter_0000001" in rank["full disk"]["left"]
        assert not [name for name in rank["full disk"]["left"] if name.endswith(".incomplete")]
    assert run_folder.has_checkpoint(folder / "full")


def test_a_checkpoint_says_what_it_was_saved_under(
    folder: Path, found: list[dict[str, Any]]
) -> None:
    layouts = {
        case.saved_under: training_checkpoint.read_metadata(folder / case.name).layout
        for case in CASES
    }
    assert layouts["dp4"] == "4 ranks"
    assert layouts["pp2-vpp2"] == "4 ranks, pipeline parallel 2, virtual pipeline 2"
    assert (
        layouts["ep2-tp2"]
        == "4 ranks, tensor parallel 2, expert parallel 2, expert tensor parallel 2"
    )
