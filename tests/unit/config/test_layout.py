"""Layouts against models, ranks and packs: what is refused and with which advice; megatron-core
takes the rest."""

import dataclasses
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_vico.config.flags import parse
from megatron_vico.config.layout import layers_of_a_stage, virtual_stages
from megatron_vico.config.registry import MODELS, get_model_config
from megatron_vico.config.schema import RunConfig
from megatron_vico.config.validate import validate
from megatron_vico.errors import ConfigError

TP, PP, CP = (
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--context-parallel-size",
)
VPP = "--num-layers-per-virtual-pipeline-stage"
EP, ETP = "--expert-model-parallel-size", "--expert-tensor-parallel-size"
FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
GROUP = "--microbatch-group-size-per-virtual-pipeline-stage"
LAYOUT = "--pipeline-model-parallel-layout"
ACCOUNT = "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"
M8, M38 = "--model-size internvl3_5-8b", "--model-size internvl3_5-38b"
M30, M241 = "--model-size internvl3_5-30b-a3b", "--model-size internvl3_5-241b-a28b"
B = "--global-batch-size"

BAD = [
    # flags, ranks, words that the message holds.
    (
        f"{M38} {TP} 16",
        16,
        ("16 does not divide num_query_groups 8 of internvl3_5-38b", "use 1, 2, 4 or 8."),
    ),
    (f"{M8} {TP} 5 --sequence-parallel", 5, ("5 does not divide", "use 2, 4 or 8.")),
    (
        f"{M241} {PP} 8",
        8,
        ("the 94 layers", f"{PP} 8", "use 1, 2, 47 or 94", "count embedding and loss as layers"),
    ),
    (
        f"{M8} {PP} 37",
        37,
        ("the 36 layers", f"{PP} 37", "use 9, 12, 18 or 36", "count the loss as a layer"),
    ),
    (
        f"{M8} {PP} 4 {VPP} 9",
        4,
        (f"{VPP} 9 is all layers of a pipeline stage", "use 1 or 3, or leave it out."),
    ),
    (f"{M8} {PP} 36 {VPP} 1", 36, (f"{VPP} 1 is all layers", "; leave it out.")),
    (
        f"{M8} {PP} 4 {VPP} 4",
        4,
        ("does not divide the 9 layers of a pipeline stage", "use 1 or 3."),
    ),
    (f"{M8} {PP} 4 {FIRST} 7", 4, ("the 36 layers", f"(with {FIRST})", "use 2 or 30")),
    (f"{M8} {PP} 4 {FIRST} 6 {ACCOUNT}", 4, (FIRST, "megatron-core takes one")),
    (f"{M8} {PP} 4 {FIRST} 0", 4, (f"{FIRST} is less than 1",)),
    (
        f"{M8} {PP} 4 {FIRST} 8 {LAST} 8 {VPP} 2",
        4,
        ("5 chunks", f"{FIRST} 8 cannot be cut into as many", "use 5."),
    ),
    (
        f"{M8} {PP} 2 {LAYOUT} Et*36|L|L",
        2,
        ("does not lay 36 layers out on 2 pipeline stages", "separated by |"),
    ),
    (f"{M8} {PP} 2 {LAYOUT} |", 2, ("does not lay 36 layers out", "36 times t")),
    (f"{M8} {PP} 2 {LAYOUT} Et*30|t*5L", 2, ("does not lay 36 layers out", "36 times t")),
    (f"{M8} {PP} 2 {LAYOUT} Ex*36|L", 2, ("Invalid layer character: x",)),
    (
        f"{M8} {PP} 2 {LAYOUT} Et*9|t*9|t*9|t*9L {B} 3",
        2,
        (f"groups of {PP} 2, and there are 3", f"{B} 2 or 4"),
    ),
    (f"{M30} {EP} 48", 48, ("48 does not divide the 128 experts", "use 8, 16, 32 or 64.")),
    (
        f"{M30} {ETP} 5",
        5,
        (f"{ETP} 5 does not divide moe_ffn_hidden_size 768", "use 1, 2, 3 or 4."),
    ),
    (f"{M30} {EP} 2 {ETP} 3", 4, (f"{EP} 2 x {ETP} 3 x {PP} 1 = 6", f"use {ETP} 1 or 2")),
    (f"{M30} {ETP} 4", 2, (f"{EP} 1 x {ETP} 4 x {PP} 1 = 4", "use 4 ranks", f"{ETP} 1 or 2")),
    (f"{M30} {TP} 2 {EP} 8", 16, ("needs --sequence-parallel; add it",)),
    (
        f"{M30} {TP} 2 {EP} 8 --sequence-parallel",
        8,
        ("= 16", "use 16 ranks", f"{EP} 1, 2 or 4", f"{ETP} 1"),
    ),
    (
        f"{M8} {TP} 2 {CP} 3",
        9,
        ("tensor 2 x pipeline 1 x context 3 = 6 ranks", "use 6 or 12 ranks."),
    ),
    (f"{M8} {CP} 4 --seq-length 4 --max-dynamic-patch 1", 4, ("less than the 256 visual tokens",)),
    (
        f"--model-size toy --seq-length 64 --max-dynamic-patch 1 {CP} 64",
        64,
        ("multiple of 128 tokens", "use 29,"),
    ),
    (f"{M8} {CP} 2 --cp-comm-type all_gather", 2, ("--cp-comm-type all_gather", "use p2p")),
    (f"{M8} --cp-comm-type p2p", 1, ("--cp-comm-type has no effect",)),
    (
        f"{M8} {B} 12",
        8,
        (
            f"{B} 12 is not a multiple of the data-parallel size 8",
            f"use {B} 8 or 16, or 6 or 12 ranks",
        ),
    ),
    (
        f"{M8} {PP} 4 {VPP} 3 {B} 12",
        8,
        ("groups of", "and there are 6", f"use {B} 8 or 16, or 4 or 12 ranks"),
    ),
    (f"{M8} {PP} 4 {VPP} 3 {GROUP} 2", 4, (f"{GROUP} 2 is less than {PP} 4", "use 4 or more")),
    (
        f"{M8} {PP} 4 {VPP} 3 {GROUP} 6 {B} 8",
        4,
        (f"groups of {GROUP} 6, and there are 8", f"use {B} 6 or 10"),
    ),
    (f"{M8} {PP} 4 {GROUP} 4", 4, (f"{GROUP} has no effect without interleaving",)),
    (f"{M8} {PP} 0", 4, (f"{PP} is 0, expected 1 or more",)),
    (f"{M8} --num-virtual-stages-per-pipeline-rank 2", 1, (f"use {VPP}",)),
]


@pytest.mark.parametrize(("words", "world_size", "held"), BAD)
def test_bad_layouts(words: str, world_size: int, held: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        validate(parse(words.split()), world_size)
    for text in held:
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("words", "chunks", "layers"),
    [
        (f"{M241} {PP} 8 {VPP} 3 {ACCOUNT}", 4, 12),
        (f"{M8} {PP} 4 {VPP} 3", 3, 9),
        (f"{M8} {PP} 4 {FIRST} 6 {LAST} 6 {VPP} 4", 3, 12),
        (f"{M8} {PP} 2 {FIRST} 16 {LAST} 20 {VPP} 4", 4, 16),
        (f"{M8} {PP} 2 {LAYOUT} Et*9|t*9|t*9|t*9L", 2, None),
        (f"{M8} {PP} 2 {LAYOUT} Et*18|t*18L", None, None),
        (f"{M8} {PP} 4", None, 9),
    ],
)
def test_chunks_are_those_that_megatron_core_builds(
    words: str, chunks: int | None, layers: int | None
) -> None:
    cfg = parse(words.split())
    model = get_model_config(cfg.model.model_size)
    validate(cfg, cfg.parallel.pipeline_model_parallel_size)
    assert virtual_stages(cfg, model.language) == chunks
    if layers is not None:
        assert layers_of_a_stage(cfg, model.language) == layers
    assert_megatron_takes(cfg, cfg.parallel.pipeline_model_parallel_size)


def usually(draw: st.DrawFn, sensible: bool) -> bool:
    """What is sensible, most of the time."""
    return sensible if draw(st.integers(0, 7)) else not sensible


@st.composite
def runs(draw: st.DrawFn) -> tuple[RunConfig, int]:
    """A layout of small numbers and a world; each choice is usually, not always, one that may fit
    the others."""
    with_experts = [
        name for name, model in MODELS.items() if model.language.num_experts is not None
    ]
    size = draw(st.sampled_from([*MODELS, *with_experts, *with_experts]))
    tensor, stages = (draw(st.sampled_from([1, 1, 1, 2, 2, 3, 4, 8])) for _ in range(2))
    context, replicas = (
        draw(st.sampled_from([1, 1, 1, 2, 3])),
        draw(st.sampled_from([1, 2, 3, 4, 8, 8, 8])),
    )
    words = ["--model-size", size, TP, tensor, PP, stages, CP, context]
    if usually(draw, MODELS[size].language.num_experts is not None):
        words += [EP, draw(st.sampled_from([1, 2, 2, 2, 3, 4, 8]))]
        words += [ETP, draw(st.sampled_from([1, 1, 2, 3]))] if draw(st.booleans()) else []
    if usually(draw, tensor > 1):
        words += ["--sequence-parallel"]
    if usually(draw, stages > 1) and draw(st.booleans()):
        words += [VPP, draw(st.sampled_from([1, 1, 2, 3, 4]))]
    if usually(draw, stages > 1):
        words += draw(
            st.sampled_from(
                ["", "", ACCOUNT, ACCOUNT.split()[1], f"{FIRST} 2", f"{FIRST} 4 {LAST} 3"]
            )
        ).split()
    words += [B, draw(st.sampled_from([1, 12, 24, 48, 256, 256]))]
    fitting = tensor * stages * context * replicas
    return parse([str(word) for word in words]), fitting if usually(draw, True) else draw(
        st.integers(1, 40)
    )


@settings(deadline=None, max_examples=600, suppress_health_check=[HealthCheck.too_slow])
@given(runs())
def test_a_layout_is_refused_or_works_in_megatron_core(run: tuple[RunConfig, int]) -> None:
    cfg, world_size = run
    try:
        validate(cfg, world_size)
    except ConfigError as error:
        assert_offers_work(cfg, world_size, str(error))
    else:
        assert_megatron_takes(cfg, world_size)


def test_the_oracle_refuses_what_validation_refuses() -> None:
    for words, world_size in (
        (f"{M8} {PP} 5", 5),
        (f"{M8} {PP} 4 {VPP} 3 {B} 6", 4),
        (f"{M30} {EP} 8", 4),
    ):
        with pytest.raises((AssertionError, ValueError, RuntimeError)):
            assert_megatron_takes(parse(words.split()), world_size)


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


def assert_offers_work(cfg: RunConfig, world_size: int, message: str) -> None:
    """Following the advice about ranks and packs leads to a run that is accepted."""
    for number in offered(message, r"use .*?((?:\d+(?:, | or )?)+) ranks"):
        validate(cfg, number)
    for number in offered(message, r"use --global-batch-size ((?:\d+(?:, (?=\d)| or (?=\d))?)+)"):
        validate(
            dataclasses.replace(
                cfg, training=dataclasses.replace(cfg.training, global_batch_size=number)
            ),
            world_size,
        )


def offered(message: str, pattern: str) -> list[int]:
    found = re.search(pattern, message)
    return [int(number) for number in re.findall(r"\d+", found[1])] if found else []
