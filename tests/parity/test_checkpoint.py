"""Checkpoints that transformers writes and reads itself: ours load there with equal logits, theirs
here bit for bit."""

from pathlib import Path

import pytest
import torch

from megatron_vico.config.registry import MODELS
from megatron_vico.convert.modules import canonical_state
from megatron_vico.convert.open import open_source
from tests.hf_exports import export_hf
from tests.parity.hf_weights import assert_equal_logits, transformers_model
from tests.toy_models import KINDS, combine, make_encoder, make_language_model


@pytest.mark.parametrize("kind", KINDS, ids=" and ".join)
def test_transformers_loads_the_export_with_equal_logits(
    kind: tuple[str, str], tmp_path: Path, single_process_groups: None
) -> None:
    model = combine(*kind)
    encoder, language_model = make_encoder(model).eval(), make_language_model(model).eval()
    modules = {"encoder": encoder, "language_model": language_model}
    export_hf(tmp_path / "export", **modules, model=model, layout="hf")
    assert_equal_logits(tmp_path / "export", encoder, language_model)


@pytest.mark.parametrize("kind", KINDS, ids=" and ".join)
def test_what_transformers_saves_is_imported_bit_for_bit(
    kind: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    single_process_groups: None,
) -> None:
    model = combine(*kind)
    monkeypatch.setitem(MODELS, model.name, model)
    encoder, language_model = make_encoder(model), make_language_model(model)
    transformers_model(encoder, language_model).save_pretrained(tmp_path / "theirs")
    imported = open_source(tmp_path / "theirs")
    assert imported.model == model
    expected = canonical_state({"encoder": encoder, "language_model": language_model})
    flash_only = ("encoder.connector_16x.", "encoder.vir.")
    assert imported.tensors.keys() == {name for name in expected if not name.startswith(flash_only)}
    for name, info in imported.tensors.items():  # without the rows that pad the vocabulary
        assert torch.equal(imported.read_tensor(name), expected[name][: info.shape[0]]), name
