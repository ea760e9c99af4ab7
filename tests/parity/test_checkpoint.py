"""Checkpoints that transformers writes and reads itself: ours load there with equal logits, theirs
here bit for bit."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from megatron_vico.config.registry import IMAGENET_MEAN, MODELS, get_model_config
from megatron_vico.convert.modules import canonical_state
from megatron_vico.convert.open import open_source
from megatron_vico.data.encode.tokenizer import load_tokenizer, train_sentencepiece
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


def test_transformers_reads_the_small_files(tmp_path: Path, single_process_groups: None) -> None:
    model = get_model_config("toy-6b")
    text = ["some text to learn from"] * 20
    tokenizer = load_tokenizer(
        train_sentencepiece(text, model_prefix=tmp_path / "toy", vocab_size=300)
    )
    export_hf(
        tmp_path / "export",
        encoder=make_encoder(model),
        language_model=make_language_model(model),
        model=model,
        layout="hf",
        tokenizer=tokenizer,
    )
    config = AutoConfig.from_pretrained(tmp_path / "export")
    assert config.model_type == "internvl"
    assert config.get_text_config().eos_token_id == tokenizer.eos_id
    processor = AutoImageProcessor.from_pretrained(tmp_path / "export")
    assert (processor.size["height"], tuple(processor.image_mean)) == (32, IMAGENET_MEAN)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert theirs("some text<|im_end|>", add_special_tokens=False).input_ids == tokenizer.encode(
        "some text<|im_end|>"
    )
