"""A language model over two tensor-parallel ranks against its one-process twin; started by torchrun
from the tests.

Prints one line a layout: the largest errors of logits, of the visual tokens' gradient and of any
weight's gradient.
"""

from dataclasses import replace

from megatron_vico import cpu_stand_in

cpu_stand_in.install()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_vico.config.registry import ModelConfig, get_model_config  # noqa: E402
from megatron_vico.config.schema import ParallelOptions, RunConfig  # noqa: E402
from megatron_vico.models.build import build_language_model, language_transformer_config  # noqa: E402
from megatron_vico.models.language_model import LanguageModel  # noqa: E402
from megatron_vico.parallel.groups import Groups, started  # noqa: E402
from megatron_vico.parallel.streams import StreamCut  # noqa: E402
from tests.toy_models import pack, randomise  # noqa: E402

LENS = (9, 12, 7, 12)


def shard(full: Tensor, param: torch.nn.Parameter, *, name: str, rank: int) -> Tensor:
    """What of a whole weight, or of its gradient, a rank holds."""
    if not getattr(param, "tensor_model_parallel", False):
        return full
    dim = param.partition_dim
    if "linear_fc1" in name:  # [gate, up]: a half of each
        return torch.cat([half.chunk(2)[rank] for half in full.chunk(2)])
    return full.chunk(2, dim=dim)[rank]


def run(model: LanguageModel, cut: StreamCut) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of the visual tokens; the weights' gradients stay on the model."""
    width = model.language.hidden_size
    generator = torch.Generator().manual_seed(2)
    leaf = torch.randn(3, width, generator=generator).requires_grad_()
    inputs = pack(LENS, visual_positions=[1, 10, 30], response_rows=range(2, 39, 3), cut=cut)
    logits = model.response_logits(model(inputs, leaf))
    (logits * torch.randn(logits.shape, generator=generator)).sum().backward()
    assert leaf.grad is not None
    return logits.detach(), leaf.grad


def errors(
    model: ModelConfig, groups: Groups, *, sequence_parallel: bool
) -> tuple[float, float, float]:
    parallel = ParallelOptions(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    twin = build_language_model(
        model, language_transformer_config(model), pg_collection=groups.encoder
    )
    randomise(twin, seed=0)
    split = build_language_model(
        model,
        language_transformer_config(model, RunConfig(parallel=parallel)),
        pg_collection=groups.language,
    )
    rank, whole = groups.language.tp.rank(), dict(twin.named_parameters())
    with torch.no_grad():
        for name, param in split.named_parameters():
            param.copy_(shard(whole[name], param, name=name, rank=rank))
    expected, expected_leaf = run(twin, StreamCut())
    logits, leaf = run(split, StreamCut.of(groups, sequence_parallel=sequence_parallel))
    worst = 0.0
    for name, param in split.named_parameters():
        grad, expected_grad = param.grad, whole[name].grad
        assert grad is not None, name
        assert expected_grad is not None
        # As mcore's finalize_model_grads does: these weights see a part of the sequence, or a part
        # of the heads.
        if (
            getattr(param, "sequence_parallel", False)
            or "q_layernorm" in name
            or "k_layernorm" in name
        ):
            torch.distributed.all_reduce(grad, group=groups.language.tp)
        worst = max(worst, error(grad, shard(expected_grad, param, name=name, rank=rank)))
    return error(logits, expected), error(leaf, expected_leaf), worst


def error(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape
    return ((value - expected).abs().max() / expected.abs().max()).item()


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    with started(
        ParallelOptions(tensor_model_parallel_size=2), seed=1, timeout_minutes=1
    ) as groups:
        for name in ("toy", "toy-6b"):
            model = get_model_config(name)
            # 500 entries are padded to 512; the padding must not show.
            model = replace(model, language=replace(model.language, vocab_size=500))
            for sequence_parallel in (False, True):
                each = errors(model, groups, sequence_parallel=sequence_parallel)
                worst = torch.tensor(each)
                torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
                if groups.is_main:
                    print("ERRORS", name, sequence_parallel, *worst.tolist(), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
