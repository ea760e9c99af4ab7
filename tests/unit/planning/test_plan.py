"""Which ranks and steps are run, and what a whole step follows from."""

import dataclasses
from pathlib import Path

import pytest

from megatron_vico.config.flags import parse
from megatron_vico.config.registry import get_model_config
from megatron_vico.errors import ConfigError
from megatron_vico.planning import plan
from megatron_vico.planning.meter import Call, Counted
from tests.planned_recipes import assert_fits

RECIPE = ["--recipe", "examples/recipes/internvl3_5_241b_a28b/consistency.yaml"]
MODEL = get_model_config("internvl3_5-241b-a28b")


def test_one_rank_of_each_kind_of_stage() -> None:
    cfg = parse(RECIPE)
    assert plan.ranks_that_differ(cfg, 128) == {"first": 0, "middle": 16, "last": 112}
    options = {"pipeline_model_parallel_size": 1, "num_layers_per_virtual_pipeline_stage": None}
    alone = dataclasses.replace(cfg, parallel=dataclasses.replace(cfg.parallel, **options))
    assert plan.ranks_that_differ(alone, 128) == {"first": 0}


@pytest.mark.parametrize(
    ("packs", "steps"), [(None, (32,)), (16, (16, 24)), (20, (16, 24)), (24, (32,)), (99, (32,))]
)
def test_steps_fill_the_pipeline_and_keep_its_groups(
    packs: int | None, steps: tuple[int, ...]
) -> None:
    assert plan.steps_to_run(parse(RECIPE), MODEL, world_size=128, packs=packs) == steps


def test_a_quick_plan_runs_the_fewest_packs_that_tell() -> None:
    assert plan.steps_to_run(parse(RECIPE), MODEL, world_size=128, packs=0) == (16, 24)
    assert plan.steps_to_run(parse(RECIPE), MODEL, world_size=512, packs=0) == (8,)


def test_too_few_packs_name_the_least() -> None:
    with pytest.raises(ConfigError, match=r"--packs 8 .* 4 chunks; use 16 or more of 32"):
        plan.steps_to_run(parse(RECIPE), MODEL, world_size=128, packs=8)


def test_a_whole_step_goes_on_as_the_second_grew() -> None:
    def step(packs: int) -> Counted:
        call = Call(phase="policy forward", call="alltoall_", group="ep(8)")
        return Counted(
            # The phase that grows faster is the highest in a whole step, though not in these.
            peak={"policy backward": 100 + packs, "encode": 80 + 3 * packs},  # type: ignore[arg-type]
            parts={"encode": {"visual tokens": 3 * packs, "policy": 80}},
            calls={call: [packs, 10 * packs]},
        )

    whole = plan.whole_step({4: step(4), 6: step(6)}, {"policy": 80}, rank=0, stage=0, packs=32)
    assert whole.peak_phase == "encode"
    assert whole.peak_bytes == 80 + 3 * 32
    assert whole.peak == {"visual tokens": 96, "policy": 80}
    assert whole.bytes_per_pack == 3
    assert (whole.traffic[0].calls, whole.traffic[0].num_bytes) == (32, 320)


@pytest.mark.slow
def test_the_smallest_recipe_fits(tmp_path: Path) -> None:
    """`make test-plan` asks this of all."""
    assert_fits("internvl3_5_1b-router-8-h200", tmp_path)
