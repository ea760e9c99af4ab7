"""The fused heads over two and over four tensor-parallel ranks against one: the largest errors
over the ranks, and what the negative control found.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vico.models.heads.cross_entropy import CrossEntropy
from megatron_vico.models.heads.kl import KLToReference
from megatron_vico.models.heads.vocabulary import VocabularyShard, head_loss, row_values

HIDDEN, VOCAB, PADDED, CHUNK = (
    16,
    45,
    64,
    4,
)  # over 4 ranks, 16 entries each: the last one holds only padding
Step = Callable[[dict[str, Tensor], VocabularyShard], Tensor]


def make_inputs(num_rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    # Logits of a toy model, 0.5 wide: products over 45, 32 and 16 columns round differently, by
    # 1e-7 of the largest.
    policy_weight = 0.125 * torch.randn(PADDED, HIDDEN, generator=generator)
    rows = torch.randn(num_rows, HIDDEN, generator=generator)
    inputs = {
        "rows": rows,
        "weight": policy_weight,
        "reference_rows": rows + 0.5 * torch.randn(rows.shape, generator=generator),
        "reference_weight": (
            policy_weight + 0.05 * torch.randn(policy_weight.shape, generator=generator)
        ),
        "row_weight": torch.rand(num_rows, generator=generator) + 0.5,
        "labels": torch.randint(VOCAB, (num_rows,), generator=generator),
    }
    inputs["weight"][VOCAB:], inputs["reference_weight"][VOCAB:] = 1e4, -1e4
    return inputs


def to_reference(inputs: dict[str, Tensor], shard: VocabularyShard) -> KLToReference:
    return KLToReference(
        rows_RH=inputs["reference_rows"], weight_VH=inputs["reference_weight"], shard=shard
    )


def kl(inputs: dict[str, Tensor], shard: VocabularyShard) -> Tensor:
    loss = to_reference(inputs, shard)
    return head_loss(inputs["rows"], inputs["weight"], inputs["row_weight"], loss=loss)


def cross_entropy(inputs: dict[str, Tensor], shard: VocabularyShard) -> Tensor:
    loss = CrossEntropy(labels_R=inputs["labels"], shard=shard)
    return head_loss(inputs["rows"], inputs["weight"], inputs["row_weight"], loss=loss)


def rows_only(inputs: dict[str, Tensor], shard: VocabularyShard) -> Tensor:
    """The rows' values, weighted with other weights than the loss, so that a mix-up would show."""
    values = row_values(inputs["rows"], inputs["weight"], loss=to_reference(inputs, shard))
    return (values * torch.arange(1, len(values) + 1)).sum()


@contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    """How often each collective is called."""
    calls: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in ("all_gather_into_tensor", "all_reduce")}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def run(step: Step, inputs: dict[str, Tensor], shard: VocabularyShard) -> dict[str, Any]:
    """Two calls, the second after a step without rows: loss, the rows' gradient, the weight's main
    gradient."""
    rank = 0 if shard.group is None else shard.group.rank()
    mine = {
        name: tensor.chunk(shard.size)[rank] if "weight" in name and tensor.dim() == 2 else tensor
        for name, tensor in inputs.items()
    }
    weight: Any = torch.nn.Parameter(mine["weight"].clone())
    weight.main_grad = torch.zeros(weight.shape)
    nothing = {
        name: tensor if name.endswith("weight") and tensor.dim() == 2 else tensor[:0]
        for name, tensor in mine.items()
    }
    first = {**nothing, "weight": weight, "rows": nothing["rows"].clone().requires_grad_()}
    second = {**mine, "weight": weight, "rows": mine["rows"].clone().requires_grad_()}
    for leaves in (first, second):
        with counted_collectives() as calls:
            loss = step(leaves, shard)
        if loss.requires_grad:
            loss.backward()
    return {
        "loss": loss.detach(),
        "rows": (
            torch.zeros(len(inputs["rows"]), HIDDEN)
            if second["rows"].grad is None
            else second["rows"].grad
        ),
        "weight": weight.main_grad,
        "collectives": dict(calls),
    }


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def compare(step: Step, num_rows: int, group: Any) -> dict[str, Any]:
    inputs = make_inputs(num_rows)
    whole = run(step, inputs, VocabularyShard(group=None, vocab_size=VOCAB, chunk_rows=CHUNK))
    split = run(step, inputs, VocabularyShard(group=group, vocab_size=VOCAB, chunk_rows=CHUNK))
    partial = split["rows"].clone()
    dist.all_reduce(split["rows"], group=group)
    found = {
        "loss": error(split["loss"], whole["loss"]),
        "rows": error(split["rows"], whole["rows"]),
        "weight": error(split["weight"], whole["weight"].chunk(group.size())[group.rank()]),
        "padding": float(
            split["weight"][max(0, VOCAB - group.rank() * len(split["weight"])) :].abs().sum()
        ),
        "control": -error(partial, whole["rows"]),
    }
    worst = torch.tensor(list(found.values()))
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    same = split["loss"].repeat(2) * torch.tensor([1.0, -1.0])
    dist.all_reduce(same, group=group, op=dist.ReduceOp.MAX)
    errors = dict(zip(found, worst.tolist(), strict=True))
    return {
        **errors,
        "control": -errors["control"],
        "apart": float(same.sum()),
        "collectives": split["collectives"],
    }


def found_cases() -> list[dict[str, Any]]:
    """What is found, case by case; the same on every one of four ranks."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return [
        {"loss_of": step.__name__, "tp": group.size(), "num_rows": num_rows}
        | compare(step, num_rows, group)
        for group in (pairs[dist.get_rank() // 2], dist.group.WORLD)
        for step in (kl, cross_entropy, rows_only)
        for num_rows in (10, 8, 1, 0)
    ]
