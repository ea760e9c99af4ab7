"""Packed attention against documents run apart, and the rotation against mcore's."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_vico.models.attention import Rotary, _Rotate, packed_layout
from megatron_vico.models.language_model import LanguageInputs, LanguageModel
from megatron_vico.models.registry import get_model_config
from tests.toy_models import make_language_model, pack

# Documents of nearly equal length are padded and attended together, very unequal ones one by one, equal ones viewed.
PACKS = {"padded": (9, 12, 7, 12), "looped": (40, 3, 5, 1), "equal": (8, 8, 8), "single": (17,)}


def documents_apart(model: LanguageModel, inputs: LanguageInputs, visual_tokens: Tensor) -> Tensor:
    """The naive version: each document in a forward pass of its own."""
    rows = []
    bounds = inputs.cu_seqlens.tolist()
    for start, end in itertools.pairwise(bounds):
        inside = (inputs.visual_positions_V >= start) & (inputs.visual_positions_V < end)
        document = LanguageInputs(
            token_ids_T=inputs.token_ids_T[start:end],
            visual_positions_V=inputs.visual_positions_V[inside] - start,
            cu_seqlens=torch.tensor([0, end - start], dtype=torch.int32),
            max_seqlen=end - start,
            response_rows_R=torch.arange(end - start),
        )
        rows.append(model(document, visual_tokens[inside]))
    return torch.cat(rows)


@pytest.mark.parametrize("name", ["toy", "toy-6b", "toy-moe"])
@pytest.mark.parametrize("kind", PACKS)
def test_packed_equals_documents_apart(name: str, kind: str, single_process_groups: None) -> None:
    model = make_language_model(get_model_config(name))
    inputs = pack(PACKS[kind], visual_positions=[1, 2, 9, 13, 14])
    layout = packed_layout(inputs.cu_seqlens, inputs.max_seqlen, rotary=Rotary(32, 1e4), dtype=torch.float32)
    assert (layout.gather_rows is not None) == (kind == "padded")

    generator = torch.Generator().manual_seed(3)
    width = model.language.hidden_size
    tokens = torch.randn(5, width, generator=generator)
    weight = torch.randn(sum(PACKS[kind]), width, generator=generator)
    results = []
    for forward in (model, lambda *args: documents_apart(model, *args)):
        model.zero_grad()
        leaf = tokens.clone().requires_grad_()
        rows = forward(inputs, leaf)
        (rows * weight).sum().backward()
        grads = {key: param.grad.clone() for key, param in model.named_parameters() if param.grad is not None}
        results.append((rows.detach(), leaf.grad, grads))

    (rows, leaf_grad, grads), (rows_apart, leaf_grad_apart, grads_apart) = results
    assert _error(rows, rows_apart) < 1e-5  # measured 8e-7
    assert _error(leaf_grad, leaf_grad_apart) < 1e-5  # measured 1.2e-6
    assert grads.keys() == grads_apart.keys()
    assert "gpt.decoder.layers.1.self_attention.q_layernorm.weight" in grads
    for key, grad in grads.items():
        assert _error(grad, grads_apart[key]) < 1e-5, key  # measured 1.6e-6


def test_a_document_does_not_see_its_neighbour(single_process_groups: None) -> None:
    model = make_language_model(get_model_config("toy"))
    inputs = pack((9, 12, 7))
    before = model(inputs)
    changed = inputs.token_ids_T.clone()
    changed[:9] = 7  # the first document
    after = model(replace(inputs, token_ids_T=changed))
    assert torch.equal(before[9:], after[9:])
    assert not torch.allclose(before[:9], after[:9], atol=0.1)


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
    x = torch.randn(50, 1, 4, 16, generator=generator)
    grad = torch.randn(50, 1, 4, 16, generator=generator)
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    freqs = RotaryEmbedding(16, 1.0, rotary_base=1000000)(50)
    expected = _apply_rotary_pos_emb_bshd(theirs, freqs)
    cos, sin = Rotary(16, 1e6)(torch.arange(50), torch.float32)
    rotated = _Rotate.apply(ours[:, 0], cos, sin)
    expected.backward(grad)
    rotated.backward(grad[:, 0])
    assert _error(rotated, expected[:, 0]) < 2e-6  # measured 3e-7
    assert _error(ours.grad, theirs.grad) < 2e-6  # measured 7e-7


def test_no_grad_keeps_no_graph_and_no_activations(single_process_groups: None) -> None:
    model = make_language_model(get_model_config("toy"))
    visual_tokens = torch.randn(2, 128, requires_grad=True)
    kept: list[Tensor] = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        rows = model(pack((9, 12), visual_positions=[1, 2]), visual_tokens)
    assert not rows.requires_grad
    assert kept == []


def _error(value: Tensor, expected: Tensor) -> float:
    return ((value - expected).abs().max() / expected.abs().max()).item()
