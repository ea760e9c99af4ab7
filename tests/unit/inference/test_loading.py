"""Both forms of a checkpoint give the engine the same weights, and say what the model is."""

import pytest
import torch

from megatron_vico.checkpoint.run_folder import iteration_folder, metadata_of
from megatron_vico.checkpoint.training_checkpoint import save_checkpoint
from megatron_vico.config.registry import get_model_config
from megatron_vico.config.schema import ParallelOptions
from megatron_vico.convert.modules import canonical_state
from megatron_vico.data.encode.sample_encoder import EncodingSettings
from megatron_vico.data.encode.tokenizer import load_tokenizer, train_sentencepiece
from megatron_vico.errors import CheckpointError
from megatron_vico.inference.loading import build_engine, load_weights, model_of
from megatron_vico.parallel import groups as process_groups
from tests.hf_exports import export_hf


@pytest.fixture(scope="module")
def make_engine(single_process_groups, tmp_path_factory):
    path = train_sentencepiece(
        ["some text to learn from"] * 20,
        model_prefix=tmp_path_factory.mktemp("t") / "t",
        vocab_size=300,
    )
    tokenizer = load_tokenizer(path)
    settings = EncodingSettings(image_size=32, max_dynamic_patch=4)
    with process_groups.started(ParallelOptions(), seed=0, timeout_minutes=1) as groups:

        def make(size="toy", *, seed):
            torch.manual_seed(seed)
            return build_engine(
                get_model_config(size), groups=groups, tokenizer=tokenizer, settings=settings
            )

        yield make


def modules_of(engine):
    return {"encoder": engine.encoder, "language_model": engine.language_model}


def save(engine, folder):
    metadata = metadata_of(engine.model, stage="router")
    save_checkpoint(iteration_folder(folder, 7), modules=modules_of(engine), metadata=metadata)


def export(engine, folder):
    model, tokenizer = engine.model, engine.tokenizer
    export_hf(folder, **modules_of(engine), model=model, layout="flash", tokenizer=tokenizer)


@pytest.mark.parametrize("write", [save, export])
def test_weights_come_back_bit_for_bit(make_engine, tmp_path, write):
    engine, other = make_engine(seed=1), make_engine(seed=2)
    write(engine, tmp_path / "checkpoint")
    assert model_of(tmp_path / "checkpoint").name == "toy"
    assert not torch.equal(engine.encoder.vit.class_token, other.encoder.vit.class_token)
    load_weights(other, tmp_path / "checkpoint")
    expected = canonical_state(modules_of(engine))
    for name, tensor in canonical_state(modules_of(other)).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("write", [save, export])
def test_another_size_is_refused(make_engine, tmp_path, write):
    write(make_engine("toy-6b", seed=0), tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"toy-6b.* toy"):
        load_weights(make_engine(seed=0), tmp_path / "checkpoint")


def test_a_folder_without_checkpoint_is_named(make_engine, tmp_path):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_weights(make_engine(seed=0), tmp_path)
