"""Packed attention against documents run apart, and the rotation against mcore's."""

import itertools
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vico.config.registry import get_model_config
from megatron_vico.models import attention
from megatron_vico.models.attention import rotate
from megatron_vico.models.attention_layout import Rotary, context_share, packed_layout
from megatron_vico.models.language_model import LanguageInputs, LanguageModel
from tests.toy_models import error, kept_for_backward, make_language_model, pack

PACKS = {
    "short": (9, 12, 7, 12),
    "unequal": (40, 3, 5, 1),
    "long": (130, 60, 100, 90),
    "equal": (8, 8, 8),
    "single": (17,),
}


def documents_apart(model: LanguageModel, inputs: LanguageInputs, visual_tokens: Tensor) -> Tensor:
    """The naive version: each document in a forward pass of its own."""
    rows = []
    for start, end in itertools.pairwise(inputs.cu_seqlens.tolist()):
        inside = (inputs.visual_positions_V >= start) & (inputs.visual_positions_V < end)
        document = LanguageInputs(
            token_ids_T=inputs.token_ids_T[start:end],
            visual_positions_V=inputs.visual_positions_V[inside] - start,
            cu_seqlens=torch.tensor([0, end - start], dtype=torch.int32),
            document_lens=(end - start,),
            response_rows_R=torch.arange(end - start),
            shard_len=end - start,
        )
        rows.append(model(document, visual_tokens[inside]))
    return torch.cat(rows)


@pytest.mark.parametrize("name", ["toy", "toy-6b", "toy-moe"])
@pytest.mark.parametrize("kind", PACKS)
def test_packed_equals_documents_apart(name: str, kind: str, single_process_groups: None) -> None:
    model = make_language_model(get_model_config(name))
    inputs = pack(PACKS[kind], visual_positions=[1, 2, 9, 13, 14])
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(5, model.language.hidden_size, generator=generator)
    weight = torch.randn(sum(PACKS[kind]), model.language.hidden_size, generator=generator)

    def results(forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        leaf = tokens.clone().requires_grad_()
        rows = forward(leaf)
        (rows * weight).sum().backward()
        grads = {name: param.grad.clone() for name, param in trained() if param.grad is not None}
        return {"rows": rows.detach(), "tokens": leaf.grad, **grads}

    trained = model.named_parameters
    found = results(lambda leaf: model(inputs, leaf))
    apart = results(lambda leaf: documents_apart(model, inputs, leaf))
    assert found.keys() == apart.keys()
    assert "gpt.decoder.layers.1.self_attention.q_layernorm.weight" in found
    for key, value in found.items():
        # Measured: 8e-7 of the rows, 1.2e-6 of the tokens' gradient, 1.6e-6 of a parameter's. An
        # expert that no token chose has a gradient of 0 on both sides.
        assert error(value, apart[key]) < 1e-5, key


def test_a_document_does_not_see_its_neighbour(single_process_groups: None) -> None:
    model = make_language_model(get_model_config("toy"))
    inputs = pack((9, 12, 7))
    before = model(inputs)
    changed = inputs.token_ids_T.clone()
    changed[:9] = 7  # the first document
    after = model(replace(inputs, token_ids_T=changed))
    assert torch.equal(before[9:], after[9:])
    assert not torch.allclose(before[:9], after[:9], atol=0.1)


@pytest.mark.parametrize("cp_size", [2, 4])
def test_shares_of_a_pack_see_what_the_causal_mask_allows(cp_size: int) -> None:
    """Each rank's chunks against the dense mask of the pack; the way back from gathered rows."""
    lens = (8, 24, 8, 16)
    documents = torch.arange(len(lens)).repeat_interleave(torch.tensor(lens))
    causal = torch.ones(sum(lens), sum(lens), dtype=torch.bool).tril()
    expected = (documents[:, None] == documents) & causal
    ranks = [
        context_share(lens, cp_size=cp_size, cp_rank=rank, device=torch.device("cpu"))
        for rank in range(cp_size)
    ]
    gathered = torch.cat([share.positions_T for share in ranks])
    for share in ranks:
        rows = []
        for chunk in share.chunks:
            start, own = sum(lens[: chunk.document]), causal[: chunk.num_tokens, : chunk.num_tokens]
            seen = torch.zeros(chunk.num_tokens, sum(lens), dtype=torch.bool)
            keys = slice(start, start + chunk.num_keys)
            seen[:, keys] = own if chunk.mask is None else chunk.mask
            rows.append(seen)
        assert torch.equal(torch.cat(rows), expected[share.positions_T])
        assert torch.equal(gathered[share.gathered_rows_W], torch.arange(sum(lens)))
    first, _, _, _, of_equal_length, *_ = ranks[1].chunks
    assert first.mask is of_equal_length.mask


def test_a_share_is_rotated_by_its_own_positions(single_process_groups: None) -> None:
    class Third:
        """The third of four context-parallel ranks."""

        size = staticmethod(lambda: 4)
        rank = staticmethod(lambda: 2)

    whole, share = (
        packed_layout(
            torch.tensor([0, 16, 24], dtype=torch.int32),
            (16, 8),
            rotary=Rotary(32, 1e4),
            dtype=torch.float32,
            cp_group=group,
        )
        for group in (None, Third())
    )
    assert whole.context is None
    assert whole.cos is not None
    assert share.cos is not None
    assert torch.equal(share.cos, whole.cos[[4, 5, 10, 11, 18, 21]])


def test_only_the_wanted_rows_come_back_in_the_order_asked(single_process_groups: None) -> None:
    model = make_language_model(get_model_config("toy"))
    rows = model(pack((9, 12)))
    wanted = model(pack((9, 12), response_rows=[20, 3, 3]))
    assert torch.equal(wanted, rows[[20, 3, 3]])
    assert model(pack((9, 12), response_rows=[])).shape == (0, 128)


def test_rotation_equals_mcore(single_process_groups: None) -> None:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 50, 1, 4, 16, generator=generator)
    mcore, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = _apply_rotary_pos_emb_bshd(mcore, RotaryEmbedding(16, 1.0, rotary_base=1000000)(50))
    cos, sin = Rotary(16, 1e6)(torch.arange(50), torch.float32)
    rotated = rotate(ours[:, 0], cos, sin)
    expected.backward(grad)
    rotated.backward(grad[:, 0])
    assert error(rotated, expected[:, 0]) < 2e-6  # measured 3e-7
    assert error(ours.grad, mcore.grad) < 2e-6  # measured 7e-7


def test_no_grad_keeps_no_graph_and_no_activations(single_process_groups: None) -> None:
    model = make_language_model(get_model_config("toy"))
    visual_tokens = torch.randn(2, 128, requires_grad=True)
    with torch.no_grad(), kept_for_backward() as kept:
        rows = model(pack((9, 12), visual_positions=[1, 2]), visual_tokens)
    assert not rows.requires_grad
    assert kept == []


def test_no_kernel_of_cuda_is_asked_for_groups_of_heads_that_it_does_not_know(
    single_process_groups: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured: no difference."""
    for dtype, mask, unknown in (
        (torch.bfloat16, None, False),
        (torch.bfloat16, torch.ones(1), True),
        (torch.float32, None, True),
    ):
        query: Any = types.SimpleNamespace(is_cuda=True, dtype=dtype)
        assert attention._no_fused_kernel_has_groups(query, mask) == unknown
    model, inputs, asked = make_language_model(get_model_config("toy-6b")), pack((9, 12)), []
    attend = attention.F.scaled_dot_product_attention

    def noted(*args: Any, **options: Any) -> Tensor:
        asked.append(options["enable_gqa"])
        return attend(*args, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", noted)
    expected = model(inputs)
    assert all(asked)
    asked.clear()
    monkeypatch.setattr(attention, "_no_fused_kernel_has_groups", lambda q, mask: True)
    found = model(inputs)
    assert asked
    assert not any(asked)
    assert error(found, expected) < 1e-6
