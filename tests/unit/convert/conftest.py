"""Toys as folders in every form, made once for all tests of conversions."""

from pathlib import Path

import pytest

from megatron_vico.config.registry import ModelConfig, get_model_config
from megatron_vico.convert.convert import convert
from megatron_vico.convert.huggingface.config import ExportOptions
from megatron_vico.data.encode.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from tests.hf_exports import export_hf
from tests.toy_models import make_encoder, make_language_model
from tests.unit.convert.folders import MakeFolder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    prefix = tmp_path_factory.mktemp("tokenizer") / "toy"
    return load_tokenizer(
        train_sentencepiece(["some text to learn from"] * 20, model_prefix=prefix, vocab_size=300)
    )


@pytest.fixture(scope="session")
def folder_of(
    tmp_path_factory: pytest.TempPathFactory, single_process_groups: None, tokenizer: Tokenizer
) -> MakeFolder:
    """Weights are those of `make_encoder` and `make_language_model` with their usual seeds."""
    root = tmp_path_factory.mktemp("toys")

    def make(size: str | ModelConfig, form: str = "flash") -> Path:
        model = get_model_config(size) if isinstance(size, str) else size
        path = root / f"{model.name}-{form}"
        if path.exists():
            return path
        if form == "megatron":
            return convert(make(model), output=path, layout="megatron")
        return export_hf(
            path,
            encoder=make_encoder(model),
            language_model=make_language_model(model),
            model=model,
            layout=form,  # type: ignore[arg-type]
            tokenizer=tokenizer,
            options=ExportOptions(flash_relative_threshold=0.25),
        )

    return make
