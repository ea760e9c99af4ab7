"""A language model over context-parallel ranks against its one-process twin; started by torchrun
from the tests.

Prints one line a layout and model: the largest errors of the outputs, of the visual tokens'
gradient and of any weight's gradient. The lines CONTROL have a backward pass that drops what other
ranks' queries owe to a rank's keys; the lines RECOMPUTE run each layer's forward pass, and so its
gather, a second time in the backward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from megatron_vico import cpu_stand_in

cpu_stand_in.install()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_vico.config.registry import get_model_config  # noqa: E402
from megatron_vico.config.schema import ParallelOptions, RunConfig  # noqa: E402
from megatron_vico.models import attention  # noqa: E402
from megatron_vico.models.build import build_language_model, language_transformer_config  # noqa: E402
from megatron_vico.models.language_model import LanguageInputs, LanguageModel  # noqa: E402
from megatron_vico.models.zigzag import zigzag_positions  # noqa: E402
from megatron_vico.parallel.groups import Groups, started  # noqa: E402
from tests.distributed.language_model_layouts import error, shard  # noqa: E402
from tests.toy_models import pack, randomise  # noqa: E402

LENS = (8, 24, 40, 8, 16)  # unequal, two of them equal, all multiples of 2 * 4
LAYOUTS = {
    "TP2+SPxCP2": ParallelOptions(
        tensor_model_parallel_size=2, context_parallel_size=2, sequence_parallel=True
    ),
    "TP2xCP2": ParallelOptions(tensor_model_parallel_size=2, context_parallel_size=2),
    "CP4": ParallelOptions(context_parallel_size=4),
    "CP2xDP2": ParallelOptions(context_parallel_size=2),
}
RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}


class Problem:
    """A pack, every third token of it visual, and what the outputs are multiplied with for a
    loss."""

    def __init__(self, width: int) -> None:
        generator = torch.Generator().manual_seed(2)
        self.inputs = pack(LENS, visual_positions=range(1, sum(LENS), 3))
        self.visual_tokens = torch.randn(
            len(self.inputs.visual_positions_V), width, generator=generator
        )
        self.weight = torch.randn(sum(LENS), width, generator=generator)

    def run(self, model: LanguageModel, mine_T: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs at the positions `mine_T` and the gradient of all visual tokens; weights keep
        their gradients."""
        places = torch.full((sum(LENS),), -1)
        places[mine_T] = torch.arange(len(mine_T))
        places_V = places[self.inputs.visual_positions_V]
        shard_len = len(mine_T) // (model.tp_group.size() if model.config.sequence_parallel else 1)
        share = LanguageInputs(
            token_ids_T=self.inputs.token_ids_T[mine_T],
            visual_positions_V=places_V[places_V >= 0],
            cu_seqlens=self.inputs.cu_seqlens,
            document_lens=LENS,
            response_rows_R=torch.arange(shard_len),
            gathered_rows_R=torch.arange(len(mine_T)) + len(mine_T) * model.cp_group.rank(),
            shard_len=shard_len,
        )
        leaf = self.visual_tokens.clone().requires_grad_()
        rows = model(share, leaf[places_V >= 0])
        # Each rank of a tensor-parallel group hands back its share of the rows' gradient.
        (rows * self.weight[mine_T]).sum().div(model.tp_group.size()).backward()
        assert leaf.grad is not None
        return rows.detach(), leaf.grad


def errors(
    name: str, layout: ParallelOptions, groups: Groups, **overrides: Any
) -> tuple[float, float, float]:
    model, tp, cp = get_model_config(name), groups.language.tp, groups.language.cp
    twin = build_language_model(
        model, language_transformer_config(model), pg_collection=groups.encoder
    )
    randomise(twin, seed=0)
    config = language_transformer_config(model, RunConfig(parallel=layout), **overrides)
    split = build_language_model(model, config, pg_collection=groups.language)
    whole = dict(twin.named_parameters())

    def of_this_rank(full: Tensor, name: str, param: torch.nn.Parameter) -> Tensor:
        return full if tp.size() == 1 else shard(full, param, name=name, rank=tp.rank())

    with torch.no_grad():
        for key, param in split.named_parameters():
            param.copy_(of_this_rank(whole[key], key, param))
    problem = Problem(model.language.hidden_size)
    expected, expected_leaf = problem.run(twin, torch.arange(sum(LENS)))
    mine_T = zigzag_positions(LENS, cp_size=cp.size(), cp_rank=cp.rank())
    rows, leaf = problem.run(split, mine_T)
    torch.distributed.all_reduce(leaf, group=cp)
    worst = 0.0
    for key, param in split.named_parameters():
        expected_grad = whole[key].grad
        if key.startswith("gpt.output_layer"):  # the loss is of the rows, before the head
            assert param.grad is None
            continue
        grad = param.grad
        assert grad is not None, key
        assert expected_grad is not None
        # As mcore's finalize_model_grads does: these weights see a part of the sequence, or a part
        # of the heads.
        if (
            getattr(param, "sequence_parallel", False)
            or "q_layernorm" in key
            or "k_layernorm" in key
        ):
            torch.distributed.all_reduce(grad, group=tp)
        torch.distributed.all_reduce(grad, group=cp)
        worst = max(worst, error(grad, of_this_rank(expected_grad, key, param)))
    return error(rows, expected[mine_T]), error(leaf, expected_leaf), worst


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


def report(kind: str, layout: str, name: str, groups: Groups, **overrides: Any) -> None:
    worst = torch.tensor(errors(name, LAYOUTS[layout], groups, **overrides))
    torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
    if groups.is_main:
        print(kind, layout, name, *worst.tolist(), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    sizes: tuple[int, int] | None = None
    for layout, options in LAYOUTS.items():
        # mcore leaks groups each time that they are started anew: layouts of the same sizes share
        # theirs.
        if sizes != (sizes := (options.tensor_model_parallel_size, options.context_parallel_size)):
            parallel_state.destroy_model_parallel()
        with started(options, seed=1, timeout_minutes=1) as groups:
            for name in ("toy", "toy-6b") if layout != "CP2xDP2" else ("toy", "toy-6b", "toy-moe"):
                report("ERRORS", layout, name, groups)
            with no_sum_over_ranks():
                report("CONTROL", layout, "toy", groups)
            report("RECOMPUTE", layout, "toy", groups, **RECOMPUTE)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
