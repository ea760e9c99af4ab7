"""TransformerEngine's layers and Adam equal this project's own layers: every stage, every layout.

As tests/distributed/test_steps.py, whose cases are of the project's own layers: loss, gradients and
parameters of two steps, against one process with torch's attention.
"""

import dataclasses
from typing import Any

import pytest

from megatron_vico.config.schema import ParallelOptions, TransformerOptions
from megatron_vico.parallel.groups import started
from tests.distributed import test_steps as steps
from tests.distributed.launch import on_ranks
from tests.distributed.run_steps import compare, found_by_ranks, write_truth
from tests.distributed.step_records import Case, save_models
from tests.distributed.test_steps import (
    ALL,
    BALANCE,
    BF16,
    CP2,
    DENSE,
    DIST,
    EP2,
    ETP1,
    FULL,
    MOE,
    OVERLAP,
    PP2,
    SP,
    TP2,
    VPP2,
    Cases,
    Options,
)
from tests.te import compiled, compiled_attention
from tests.toy_data import write_conversations
from tests.training_runs import ToyData, make_toy_shards, toy_config

PACKS = 8  # of a step

# The fused permutation is Triton's, slow in the interpreter: test_permutation.py.
UNFUSED: Options = {"split": {"moe_permute_fusion": False}}
GROUPED: Options = {"split": {"moe_permute_fusion": False, "moe_grouped_gemm": True}}
FUSED: Options = {"split": {"gradient_accumulation_fusion": True}}

ONE: Cases = {
    f"{model}, {stage}": (model, stage, UNFUSED if model == MOE else {})
    for model in (DENSE, MOE)
    for stage in ("pretrain", "warmup", "consistency", "router")
} | {
    "vit trained, full recompute, distributed optimizer": (DENSE, "consistency", ALL | FULL | DIST),
    "frozen language model, full recompute": (DENSE, "warmup", FULL),
    "fused weight gradients": (DENSE, "consistency", FUSED),
    "grouped experts, balancing loss": (MOE, "consistency", GROUPED | BALANCE),
}
HALF: Cases = {
    "bf16": (DENSE, "consistency", BF16),
    "bf16, grouped experts": (MOE, "pretrain", BF16 | GROUPED),
}
FP8: Options = {"bf16": True, "fp8_format": "hybrid"}
IN_BLOCKS: Options = {"fp8_recipe": "blockwise"}
QUANTISED: Cases = {
    "fp8 tp2 sp pp2": (DENSE, "consistency", FP8 | TP2 | SP | PP2),
    "fp8 in blocks, cp2 dp2, full recompute": (
        DENSE,
        "consistency",
        FP8 | IN_BLOCKS | CP2 | FULL | DIST,
    ),
    "fp8 moe ep2 dp2, grouped": (MOE, "consistency", FP8 | EP2 | GROUPED),
}
FOUR: Cases = {
    # Ring attention, with and without tensor parallelism.
    "tp2 sp cp2": (DENSE, "consistency", TP2 | SP | CP2),
    "cp2 dp2 overlap": (DENSE, "consistency", CP2 | OVERLAP),
    "tp2 pp2": (DENSE, "pretrain", TP2 | PP2),
    # Weight gradients are in the buckets when their hooks are called.
    "pp2 vpp2 dp2 overlap, full recompute, fused weight gradients": (
        DENSE,
        "consistency",
        PP2 | VPP2 | OVERLAP | FULL | FUSED,
    ),
    "moe ep2 cp2, grouped": (MOE, "consistency", EP2 | CP2 | GROUPED),
    "moe tp2 sp ep2 etp1 pp2 vpp2, full recompute": (
        MOE,
        "consistency",
        TP2 | SP | EP2 | ETP1 | PP2 | VPP2 | FULL | GROUPED,
    ),
}


@pytest.fixture(scope="module")
def found(
    toy_data: ToyData, single_process_groups: None, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """The errors of all cases, by name and step."""
    folder = tmp_path_factory.mktemp("te_steps")
    images = write_conversations(folder / "images", num_samples=48, seed=2, noisy=True)
    data = {False: make_toy_shards(folder, images, toy_data.tokenizer)}
    results: dict[str, list[dict[str, Any]]] = {}
    with started(ParallelOptions(), seed=1, timeout_minutes=1) as groups:
        for model in (DENSE, MOE):
            cfg = toy_config(toy_data, "pretrain", model_size=model, attention="sdpa")
            save_models(folder / model, model, cfg, groups)
        made: dict[str, Case] = {}
        for name, (model, stage, options) in (ONE | HALF | FOUR | QUANTISED).items():
            same = (*steps.TWIN_OPTIONS, *FP8, *IN_BLOCKS)
            twin = {key: value for key, value in options.items() if key in same}
            truth = "_".join([model, stage, *twin])
            made[name] = steps.make_case(
                name, (model, stage, options, PACKS), data=data, models=folder, truth=truth
            )
            if not (folder / truth).exists():
                own = steps.make_case(
                    "own layers",
                    (model, stage, twin, PACKS),
                    data=data,
                    models=folder,
                    truth=truth,
                )
                case = _unfused(own) if "fp8_format" in twin else _with_own_layers(own)
                write_truth(case, groups, folder / truth)
        compiled.calls.clear()
        for name, (model, stage, options) in QUANTISED.items():
            fp8 = {key: value for key, value in options.items() if key in (*FP8, *IN_BLOCKS)}
            run = (model, stage, fp8, PACKS)
            truth = "_".join([model, stage, "bf16"])
            case = steps.make_case("fp8", run, data=data, models=folder, truth=truth)
            if not (folder / truth).exists():
                run = (model, stage, BF16, PACKS)
                plain = steps.make_case("bf16", run, data=data, models=folder, truth=truth)
                write_truth(_unfused(plain), groups, folder / truth)
            results[_noise(name)] = compare(_unfused(case), groups, folder)
        for name in (*ONE, *HALF):
            results[name] = compare(made[name], groups, folder)
    cases = [made[name] for name in (*FOUR, *QUANTISED)]
    ranks = on_ranks(found_by_ranks, cases, folder, num_ranks=4, preloaded="tests.te.preloaded")
    return results | ranks[0]


def _noise(name: str) -> str:
    """Of a case in FP8: the errors of one process in FP8 against one in bf16."""
    return f"{name}: FP8's own"


def _with_own_layers(case: Case) -> Case:
    model = dataclasses.replace(case.cfg.model, attention="sdpa")
    return _unfused(dataclasses.replace(case, cfg=dataclasses.replace(case.cfg, model=model)))


def _unfused(case: Case) -> Case:
    transformer = TransformerOptions(moe_permute_fusion=False)
    return dataclasses.replace(case, cfg=dataclasses.replace(case.cfg, transformer=transformer))


@pytest.mark.parametrize("name", [*ONE, *FOUR])
def test_transformer_engines_layers_equal_our_own(
    name: str, found: dict[str, list[dict[str, Any]]]
) -> None:
    """In fp32. Measured: loss 4e-7, norm 2e-6, parameters 5e-7, gradients 5e-6, of an expert
    router 2e-5."""
    for step in found[name]:
        for count in ("samples", "tiles", "response_tokens", "router_accuracy"):
            assert step[count] == 0
        assert step["loss"] < 1e-5
        assert step["grad_norm"] < 1e-5
        assert step["router_threshold"] < 1e-5
        assert step["grads"][0] < 5e-5, step["grads"]
        assert step["params"][0] < 1e-5, step["params"]


@pytest.mark.parametrize("name", HALF)
def test_in_bfloat16_as_near_as_rounding_allows(
    name: str, found: dict[str, list[dict[str, Any]]]
) -> None:
    for step in found[name]:
        assert step["loss"] < 0.01
        assert step["grad_norm"] < 0.03
        assert step["params"][0] < 5e-3, step["params"]


@pytest.mark.parametrize("name", QUANTISED)
def test_in_fp8_ranks_are_as_near_to_one_as_fp8_is_to_bf16(
    name: str, found: dict[str, list[dict[str, Any]]]
) -> None:
    """Parts of a tensor are rounded each by its own largest number: other noise of the same size,
    that of one process in FP8 beside bf16."""
    noise = [step for each in QUANTISED for step in found[_noise(each)]]
    for step in found[name]:
        for figure in ("loss", "grad_norm"):
            assert step[figure] < 2 * max(each[figure] for each in noise)
        for figure in ("grads", "params"):
            assert step[figure][0] < 2 * max(each[figure][0] for each in noise), step[figure]


def test_its_kernels_are_the_ones_that_ran(found: dict[str, list[dict[str, Any]]]) -> None:
    """cuDNN's attention of packed documents, fused rotary embedding, norms, grouped products, the
    router, clipping without a host wait, Adam."""
    expected = (
        "fused_attn_fwd fused_attn_bwd fused_rope_forward fused_rope_backward rmsnorm_fwd"
        " rmsnorm_bwd generic_gemm te_general_grouped_gemm fused_topk_with_score_function_fwd"
        " multi_tensor_l2norm multi_tensor_scale_tensor multi_tensor_adam"
    ).split()
    assert [name for name in expected if not compiled.calls[name]] == []
    packed = (
        "NVTE_THD_THD_THD",
        "NVTE_NO_BIAS",
        "NVTE_PADDING_CAUSAL_MASK",
        "NVTE_VANILLA_SOFTMAX",
    )
    assert compiled_attention.queries == {(*packed, 0.0)}
