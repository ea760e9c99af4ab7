"""Language models and heads over four ranks against one.

Of each language model and layout: the largest errors of the logits, of the visual tokens' gradient
and of any weight's gradient. `control` has a backward pass that drops what other ranks' queries owe
to a rank's keys; `recompute` runs each layer's forward pass, and so its gather, a second time in
the backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_vico.config.registry import get_model_config
from megatron_vico.config.schema import ParallelOptions, RunConfig
from megatron_vico.models import attention
from megatron_vico.models.build import build_language_model, language_transformer_config
from megatron_vico.models.language_model import LanguageModel
from megatron_vico.parallel.groups import Groups
from megatron_vico.parallel.streams import StreamCut, row_slice
from tests.distributed import kl_head_ranks
from tests.distributed.cached_layouts import CachedLayouts
from tests.toy_models import pack, randomise

LENS = (9, 24, 37, 9, 16)  # unequal, two of them equal; most need padding over context ranks
NUM_TOKENS = sum(LENS)
VISUAL = range(1, NUM_TOKENS, 3)
ROWS = range(2, NUM_TOKENS, 2)
TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": TP2,
    "tp2 sp": TP2 | SP,
    "tp2 cp2": TP2 | {"context_parallel_size": 2},
    "tp2 sp cp2": TP2 | SP | {"context_parallel_size": 2},
    "cp4": {"context_parallel_size": 4},
    "cp2 dp2": {"context_parallel_size": 2},
}
RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


def run(model: LanguageModel, cut: StreamCut) -> tuple[Tensor, Tensor]:
    """Logits of this rank's rows and the gradient of the visual tokens; weights keep theirs."""
    generator = torch.Generator().manual_seed(2)
    leaf = torch.randn(len(VISUAL), model.language.hidden_size, generator=generator)
    leaf.requires_grad_()
    weight_RV = torch.randn(len(ROWS), model.language.vocab_size, generator=generator)
    inputs = pack(LENS, visual_positions=list(VISUAL), response_rows=list(ROWS), cut=cut)
    shard = cut.context_rank * cut.sequence_size + cut.sequence_rank
    logits = model.response_logits(model(inputs, leaf[inputs.visual_shard_V == shard]))
    (logits * weight_RV[_own_rows(cut)]).sum().backward()
    assert leaf.grad is not None
    return logits.detach(), leaf.grad


def _own_rows(cut: StreamCut) -> slice:
    return row_slice(len(ROWS), size=cut.context_size, rank=cut.context_rank)


def part_of(full: Tensor, param: torch.nn.Parameter, *, name: str, groups: Groups) -> Tensor:
    """What of a whole weight, or of its gradient, this rank holds."""
    tensor = groups.language.tp
    if tensor.size() == 1 or not getattr(param, "tensor_model_parallel", False):
        return full
    if "linear_fc1" in name:  # [gate, up]: a part of each
        return torch.cat([half.chunk(tensor.size())[tensor.rank()] for half in full.chunk(2)])
    return full.chunk(tensor.size(), dim=param.partition_dim)[tensor.rank()]


def errors(name: str, options: dict[str, Any], groups: Groups) -> dict[str, float]:
    """The largest of any rank."""
    model = get_model_config(name)
    # 500 entries are padded to 512; the padding must not show.
    model = replace(model, language=replace(model.language, vocab_size=500))
    parallel = ParallelOptions(**options)
    twin, split = (
        build_language_model(
            model,
            language_transformer_config(model, RunConfig(parallel=each)),
            pg_collection=module_groups,
        )
        for each, module_groups in (
            (ParallelOptions(), groups.encoder),
            (parallel, groups.language),
        )
    )
    randomise(twin, seed=0)
    whole = dict(twin.named_parameters())
    with torch.no_grad():
        for key, param in split.named_parameters():
            param.copy_(part_of(whole[key], param, name=key, groups=groups))
    expected, expected_leaf = run(twin, StreamCut())
    cut = StreamCut.of(groups, sequence_parallel=parallel.sequence_parallel)
    logits, leaf = run(split, cut)
    torch.distributed.all_reduce(leaf, group=groups.language.cp)
    if parallel.sequence_parallel:  # else each has the gradient of all its context rank's tokens
        torch.distributed.all_reduce(leaf, group=groups.language.tp)
    weights = 0.0
    for key, param in split.named_parameters():
        grad, expected_grad = param.grad, whole[key].grad
        assert grad is not None, key
        assert expected_grad is not None, key
        # As mcore's finalize_model_grads does: these weights see a part of the sequence, or a part
        # of the heads.
        if getattr(param, "sequence_parallel", False) or (
            "_layernorm" in key and "attention" in key
        ):
            torch.distributed.all_reduce(grad, group=groups.language.tp)
        torch.distributed.all_reduce(grad, group=groups.language.cp)
        truth = part_of(expected_grad, param, name=key, groups=groups)
        weights = max(weights, error(grad, truth))
    found = torch.tensor(
        [error(logits, expected[_own_rows(cut)]), error(leaf, expected_leaf), weights]
    )
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return dict(zip(("logits", "visual tokens", "weights"), found.tolist(), strict=True))


def error(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape
    return ((value - expected).abs().max() / expected.abs().max()).item()


@contextmanager
def no_sum_over_ranks() -> Iterator[None]:
    """A gather whose backward pass only takes this rank's part."""
    attention.gather_from_sequence_parallel_region = partial(
        gather_from_sequence_parallel_region, tensor_parallel_output_grad=False
    )
    try:
        yield
    finally:
        attention.gather_from_sequence_parallel_region = gather_from_sequence_parallel_region


def found_cases() -> list[dict[str, Any]]:
    """What is found, case by case; the same on every rank."""
    layouts = CachedLayouts()
    found = []
    for layout, options in LAYOUTS.items():
        groups = layouts.switch_to(ParallelOptions(**options))
        cases = [("errors", "toy", options), ("errors", "toy-6b", options)]
        if "cp" in layout:
            cases += [("control", "toy", options), ("recompute", "toy", options | RECOMPUTE)]
        if layout == "cp2 dp2":
            cases.append(("errors", "toy-moe", options))
        for kind, name, case_options in cases:
            with no_sum_over_ranks() if kind == "control" else nullcontext():
                worst = errors(name, case_options, groups)
            found.append({"kind": kind, "layout": layout, "model": name, **worst})
    return found + kl_head_ranks.found_cases()
