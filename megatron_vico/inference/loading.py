"""Builds an engine and puts the weights of a checkpoint of either form into it."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_vico.checkpoint import training_checkpoint
from megatron_vico.checkpoint.integrity import WEIGHTS, require_intact
from megatron_vico.checkpoint.run_folder import has_checkpoint, model_of_run
from megatron_vico.config.config_json import read_model
from megatron_vico.config.registry import MODELS, ModelConfig
from megatron_vico.config.schema import ParallelOptions, RunConfig, TrainingOptions
from megatron_vico.convert.huggingface.config import layout_of
from megatron_vico.convert.modules import load_source
from megatron_vico.convert.open import open_source
from megatron_vico.data.encode.sample_encoder import EncodingSettings
from megatron_vico.data.encode.tokenizer import Tokenizer
from megatron_vico.files import read_json
from megatron_vico.inference.engine import Engine
from megatron_vico.models.build import (
    build_language_model,
    build_vision_encoder,
    language_transformer_config,
    vision_transformer_config,
)
from megatron_vico.parallel.groups import Groups


def build_engine(
    model: ModelConfig,
    *,
    groups: Groups,
    tokenizer: Tokenizer,
    settings: EncodingSettings,
    bf16: bool = False,
    batch_size: int = 64,
    stop_ids: Sequence[int] = (),
) -> Engine:
    """An engine with fresh weights, which `load_weights` fills, on the device of the groups.

    The language model is spread over the groups' tensor-parallel ranks; what is not named here is
    as in `Engine`.
    """
    parallel = ParallelOptions(tensor_model_parallel_size=groups.language.tp.size())
    cfg = RunConfig(training=TrainingOptions(bf16=bf16), parallel=parallel)
    encoder = build_vision_encoder(
        model, vision_transformer_config(model, bf16=bf16), pg_collection=groups.encoder
    ).requires_grad_(False)
    # mcore's local layers with torch's attention, on a GPU too: they know the KV cache.
    language_model = build_language_model(
        model,
        language_transformer_config(model, cfg),
        pg_collection=groups.language,
        attention="sdpa",
    ).requires_grad_(False)
    dtype = language_model.config.params_dtype
    return Engine(
        encoder=encoder.to(groups.device, dtype),
        language_model=language_model.to(groups.device, dtype),
        tokenizer=tokenizer,
        model=model,
        settings=settings,
        batch_size=batch_size,
        stop_ids=stop_ids,
    )


def load_weights(engine: Engine, source: str | Path) -> None:
    """Put the weights of a run's latest step, or of a Hugging Face folder, into an engine.

    What a layout does not hold (connector_16x and ViR outside of flash) keeps its weights.

    Raises:
        CheckpointError: if it is no checkpoint, broken, or of another model than the engine's.
    """
    if has_checkpoint(source):
        modules = {"encoder": engine.encoder, "language_model": engine.language_model}
        training_checkpoint.load_weights(source, modules=modules, model_size=engine.model.name)
        return
    name = engine.model.name
    opened = open_source(source, model_size=name if name in MODELS else None)
    require_intact(Path(source), files=WEIGHTS)
    load_source(opened, encoder=engine.encoder, language_model=engine.language_model)


def model_of(source: str | Path) -> ModelConfig:
    """The model of a run's folder, or of a Hugging Face folder in any layout.

    Raises:
        CheckpointError: if it is no checkpoint, or its model cannot be computed.
    """
    if has_checkpoint(source):
        return model_of_run(source)
    path = Path(source) / "config.json"
    config = read_json(path)
    layout_of(config, path=str(path))  # refuses what is no InternVL
    return read_model(config, path=str(path))


def fingerprint(engine: Engine) -> str:
    """16 hexadecimal digits of all weights and their names; of this rank's, if ranks share them."""
    digest = hashlib.sha256(engine.model.name.encode())
    for prefix, module in (("encoder", engine.encoder), ("language_model", engine.language_model)):
        for name, param in module.named_parameters():
            digest.update(f"{prefix}.{name} {torch.hash_tensor(param.detach()).item()}".encode())
    return digest.hexdigest()[:16]
