"""Both models' heads with rows of a given KL, the textbook formula, and the fused head on them."""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_vico.models.heads import vocabulary
from megatron_vico.models.heads.kl import KLToReference
from megatron_vico.models.heads.vocabulary import VocabularyShard, head_loss, row_values

if TYPE_CHECKING:
    import pytest  # which a GPU machine may lack


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Rows and heads of a reference and of a policy that differs from it a little."""

    policy_rows_RH: Tensor
    policy_weight_VH: Tensor
    reference_rows_RH: Tensor
    reference_weight_VH: Tensor
    row_weight_R: Tensor
    vocab_size: int

    def to(self, target: Any) -> "Heads":
        """Of another dtype or on another device, with leaves of the policy that want gradients."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.detach().to(target)
        values["policy_rows_RH"].requires_grad_()
        values["policy_weight_VH"].requires_grad_()
        return Heads(**values)

    def tensors(self) -> list[Tensor]:
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def to_reference(self, chunk_rows: int = 1024) -> KLToReference:
        """The loss, on one rank."""
        shard = VocabularyShard(group=None, vocab_size=self.vocab_size, chunk_rows=chunk_rows)
        return KLToReference(
            rows_RH=self.reference_rows_RH, weight_VH=self.reference_weight_VH, shard=shard
        )


def make_heads(
    num_rows: int,
    hidden: int,
    vocab_size: int,
    *,
    mean_kl: float = 0.1,
    logit_std: float = 3.0,
    padding: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Heads:
    """The policy's logits are off the reference's by a noise that gives this mean KL, roughly."""
    generator = torch.Generator().manual_seed(num_rows + vocab_size)
    noise = mean_kl**0.5 / logit_std

    def near(num: int, scale: float) -> tuple[Tensor, Tensor]:
        reference = scale * torch.randn(num, hidden, generator=generator)
        return reference, reference + noise * scale * torch.randn(num, hidden, generator=generator)

    reference_rows, policy_rows = near(num_rows, 1.0)
    reference_weight, policy_weight = near(vocab_size + padding, logit_std / hidden**0.5)
    # Whoever looks at padding will know.
    reference_weight[vocab_size:], policy_weight[vocab_size:] = 1e4, -1e4
    heads = Heads(
        policy_rows_RH=policy_rows,
        policy_weight_VH=policy_weight,
        reference_rows_RH=reference_rows,
        reference_weight_VH=reference_weight,
        row_weight_R=(0.5 + torch.rand(num_rows, generator=generator)) / max(1, num_rows),
        vocab_size=vocab_size,
    )
    return replace(heads.to(dtype), row_weight_R=heads.row_weight_R)


def with_main_grad(heads: Heads) -> Heads:
    """As Megatron's DDP prepares a weight."""
    weight: Any = torch.nn.Parameter(heads.policy_weight_VH.detach())
    weight.main_grad = torch.zeros(weight.shape, device=weight.device)
    return replace(heads, policy_weight_VH=weight)


def naive_kl(reference: Tensor, policy: Tensor) -> Tensor:
    """The textbook formula, in the dtype of the logits."""
    log_q, log_p = reference.log_softmax(-1), policy.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def naive_kl_loss(heads: Heads) -> Tensor:
    """The textbook formula through autograd; logits are rounded to the dtype of the rows, as output
    layers do."""
    real = slice(heads.vocab_size)
    logits_p = heads.policy_rows_RH @ heads.policy_weight_VH[real].T
    logits_q = heads.reference_rows_RH @ heads.reference_weight_VH[real].T
    wide = torch.promote_types(logits_p.dtype, torch.float32)
    return (naive_kl(logits_q.to(wide), logits_p.to(wide)) * heads.row_weight_R).sum()


def ours(heads: Heads, chunk_rows: int = 1024) -> Tensor:
    """The fused head, as training calls it on one rank."""
    loss = heads.to_reference(chunk_rows)
    return head_loss(heads.policy_rows_RH, heads.policy_weight_VH, heads.row_weight_R, loss=loss)


def our_rows(heads: Heads, chunk_rows: int) -> Tensor:
    loss = heads.to_reference(chunk_rows)
    return row_values(heads.policy_rows_RH, heads.policy_weight_VH, loss=loss)


def grads_of(heads: Heads) -> tuple[Tensor, Tensor]:
    """Of the rows and of the head, the latter from `main_grad` where there is one."""
    rows_grad = heads.policy_rows_RH.grad
    weight_grad = getattr(heads.policy_weight_VH, "main_grad", heads.policy_weight_VH.grad)
    assert rows_grad is not None
    assert weight_grad is not None
    return rows_grad, weight_grad


def emulate_wide_products(monkeypatch: "pytest.MonkeyPatch") -> list[str]:
    """bf16 products into float32, which the CPU lacks; returns a list of those that are taken."""
    mm, taken = torch.mm, []

    def wide_mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        taken.append("mm")
        return mm(a.to(out_dtype), b.to(out_dtype))

    def wide_addmm(
        total: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor
    ) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        assert total is out
        taken.append("addmm")
        return total.addmm_(a.to(out_dtype), b.to(out_dtype))

    is_bf16 = lambda tensor: tensor.dtype == torch.bfloat16  # noqa: E731
    monkeypatch.setattr(vocabulary, "_has_wide_product", is_bf16)
    monkeypatch.setattr(vocabulary.torch, "mm", wide_mm)
    monkeypatch.setattr(vocabulary.torch, "addmm", wide_addmm)
    return taken


def errors_against_float64(heads: Heads, loss: Tensor) -> tuple[float, float, float]:
    """Backpropagates `loss`; relative errors of its value, the rows' gradient and the weight's."""
    loss.backward()
    exact = heads.to(torch.float64)
    expected = naive_kl_loss(exact)
    expected.backward()
    rows, weight = (
        float((found.double() - truth).norm() / truth.norm())
        for found, truth in zip(grads_of(heads), grads_of(exact), strict=True)
    )
    return abs(loss.item() / expected.item() - 1), rows, weight
