"""megatron-core takes every layout that validation lets through, and cuts it as validation says."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_vico.config.layout import replicas_in_step
from megatron_vico.config.pipeline_split import layers_of_a_stage, virtual_stages
from megatron_vico.config.registry import MODELS, get_model_config
from megatron_vico.config.schema import RunConfig
from megatron_vico.config.validate import validate
from megatron_vico.errors import ConfigError
from tests.unit.config.run_words import run


@pytest.mark.parametrize(
    ("words", "chunks", "layers"),
    [
        ("241b PP=8 VPP=3 EMBEDDING LOSS", 4, 12),
        ("241b PP=8 LAST=10", None, 12),
        ("241b PP=4 FIRST=23 LAST=23", None, 24),
        ("8b PP=4 VPP=3", 3, 9),
        ("8b PP=4 FIRST=6 LAST=6 VPP=4", 3, 12),
        ("8b PP=2 FIRST=16 LAST=20 VPP=4", 4, 16),
        ("8b PP=2 LAYOUT=Et*9|t*9|t*9|t*9L", 2, None),
        ("8b PP=2 LAYOUT=Et*18|t*18L", None, None),
        ("8b PP=4", None, 9),
    ],
)
def test_chunks_are_those_that_megatron_core_builds(
    words: str, chunks: int | None, layers: int | None
) -> None:
    cfg = run(words)
    model = get_model_config("internvl3_5-241b-a28b" if "241b" in words else "internvl3_5-8b")
    validate(cfg, cfg.parallel.pipeline_model_parallel_size)
    assert virtual_stages(cfg, model.language) == chunks
    if layers is not None:
        assert layers_of_a_stage(cfg, model.language) == layers
    assert_megatron_takes(cfg, cfg.parallel.pipeline_model_parallel_size)


def usually(draw: st.DrawFn, sensible: bool) -> bool:
    """What is sensible, most of the time."""
    return sensible if draw(st.integers(0, 7)) else not sensible


@st.composite
def layouts(draw: st.DrawFn) -> tuple[RunConfig, int]:
    """A layout of small numbers and a world; each choice is usually, not always, one that may fit
    the others."""
    with_experts = [
        name for name, model in MODELS.items() if model.language.num_experts is not None
    ]
    size = draw(st.sampled_from([*MODELS, *with_experts, *with_experts]))
    tensor, stages = (draw(st.sampled_from([1, 1, 1, 2, 2, 3, 4, 8])) for _ in range(2))
    context = draw(st.sampled_from([1, 1, 1, 2, 3]))
    replicas = draw(st.sampled_from([1, 2, 3, 4, 8, 8, 8]))
    words = f"--model-size {size} TP={tensor} PP={stages} CP={context}"
    if usually(draw, MODELS[size].language.num_experts is not None):
        words += f" EP={draw(st.sampled_from([1, 2, 2, 2, 3, 4, 8]))}"
        words += draw(st.sampled_from(["", "", " ETP=1", " ETP=2", " ETP=3"]))
    if usually(draw, tensor > 1):
        words += " SP"
    if usually(draw, stages > 1):
        words += draw(st.sampled_from(["", "", " VPP=1", " VPP=2", " VPP=3", " VPP=4"]))
        words += draw(st.sampled_from(["", "", " EMBEDDING LOSS", " LOSS", " FIRST=2", " FIRST=4"]))
    words += f" BATCH={draw(st.sampled_from([1, 12, 24, 48, 256, 256]))}"
    fitting = tensor * stages * context * replicas
    return run(words), fitting if usually(draw, True) else draw(st.integers(1, 40))


@pytest.mark.slow
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(layouts())
def test_a_layout_is_refused_or_works_in_megatron_core(layout: tuple[RunConfig, int]) -> None:
    try:
        validate(*layout)
    except ConfigError:
        return
    assert_megatron_takes(*layout)


@pytest.mark.parametrize(
    ("words", "ranks"), [("8b PP=5", 5), ("8b PP=4 VPP=3 BATCH=6", 4), ("30b EP=8", 4)]
)
def test_the_oracle_refuses_what_validation_refuses(words: str, ranks: int) -> None:
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        assert_megatron_takes(run(words), ranks)


def assert_megatron_takes(cfg: RunConfig, world_size: int) -> None:
    """megatron-core's own rules, without process groups: its configuration, its ranks, its layers,
    its schedule."""
    from megatron.core.parallel_state import RankGenerator
    from megatron.core.pipeline_parallel.schedules import get_schedule_table
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    from megatron_vico.models.build import language_transformer_config

    parallel, model = cfg.parallel, get_model_config(cfg.model.model_size)
    tensor, stages, context = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    built = language_transformer_config(model, cfg)

    # initialize_model_parallel's two grids: their sizes fill the world and their pipelines are the
    # same ranks.
    data, rest = divmod(world_size, tensor * stages * context)
    assert rest == 0
    assert cfg.training.global_batch_size % data == 0
    order = "tp-cp-ep-dp-pp"
    dense = RankGenerator(tp=tensor, ep=1, dp=data, pp=stages, cp=context, order=order)
    width, experts = built.expert_tensor_parallel_size, parallel.expert_model_parallel_size
    expert_data, rest = divmod(world_size, width * experts * stages)
    assert rest == 0
    expert = RankGenerator(tp=width, ep=experts, dp=expert_data, pp=stages, cp=1, order=order)
    assert dense.world_size == expert.world_size == world_size
    assert dense.get_ranks("pp") == expert.get_ranks("pp")
    replica_of = {rank: i for replicas in dense.get_ranks("dp") for i, rank in enumerate(replicas)}
    coupled = replicas_in_step(parallel, model)
    of_experts = [{replica_of[rank] for rank in ranks} for ranks in expert.get_ranks("tp-ep")]
    assert data % coupled == 0
    assert all(len({replica // coupled for replica in each}) == 1 for each in of_experts)
    assert (max(map(len, of_experts)) > 1) == (coupled > 1)
    assert (model.language.num_experts or experts) % experts == 0
    assert (model.language.moe_ffn_hidden_size or width) % width == 0

    chunks = built.virtual_pipeline_model_parallel_size
    if cfg.transformer.pipeline_model_parallel_layout is None:
        layers = [
            get_num_layers_to_build(built, vp_stage=chunk if chunks else None, pp_rank=stage)
            for stage in range(stages)
            for chunk in range(chunks or 1)
        ]
        assert sum(layers) == model.language.num_layers
    if chunks is not None:
        assert built.overlap_p2p_comm
        assert not built.batch_p2p_comm
        group, microbatches = (
            built.microbatch_group_size_per_vp_stage,
            cfg.training.global_batch_size // data,
        )
        assert stages <= group <= microbatches  # forward_backward_pipelining_with_interleaving
        assert not 0 < microbatches % group < stages
        assert len(get_schedule_table(microbatches, chunks, group)) == microbatches * chunks
