"""Tiny runs of the real trainer: a shared data set, configurations, figures of a run."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from megatron_vico.config.schema import RunConfig
from megatron_vico.data.encode.sample_encoder import EncodingSettings
from megatron_vico.data.encode.tokenizer import load_tokenizer, train_sentencepiece
from megatron_vico.shard_tools.writer import make_shards
from tests.toy_data import write_conversations

if TYPE_CHECKING:
    from megatron_vico.models.internvl import VisionEncoder
    from megatron_vico.models.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class ToyData:
    """Where the shared tokenizer and shards are."""

    tokenizer: Path
    shards: Path


def make_toy_data(folder: Path, *, num_samples: int = 48) -> ToyData:
    """Tokenizer and shards of `tests/toy_data.py`."""
    jsonl = write_conversations(folder / "raw", num_samples=num_samples)
    words = [f"{line} {index}\n" for index, line in enumerate(jsonl.read_text().splitlines())]
    tokenizer_path = train_sentencepiece(
        words * 3, model_prefix=folder / "tokenizer", vocab_size=400
    )
    return make_toy_shards(folder, jsonl, tokenizer_path)


def make_toy_shards(folder: Path, jsonl: Path, tokenizer_path: Path) -> ToyData:
    """Shards of conversations whose images lie beside them."""
    make_shards(
        jsonl,
        image_root=jsonl.parent,
        out_dir=folder / "shards",
        tokenizer=load_tokenizer(tokenizer_path),
        settings=EncodingSettings(image_size=32, max_dynamic_patch=4, use_thumbnail=True),
    )
    return ToyData(tokenizer=tokenizer_path, shards=folder / "shards")


def toy_settings(data: ToyData) -> dict[str, Any]:
    """What toy runs of all stages share, as a recipe has it."""
    return {
        "data_path": [str(data.shards)],
        "tokenizer_model": str(data.tokenizer),
        "seq_length": 600,
        "max_tiles_per_pack": 40,
        "max_samples_per_pack": 4,
        "max_dynamic_patch": 4,
        "num_workers": 0,
        "global_batch_size": 2,
        "lr": 1e-3,
        "min_lr": 1e-5,
        "adam_eps": 1e-5,
    }


def toy_config(data: ToyData, stage: str, **options: Any) -> RunConfig:
    """A run of the toy model; `options` are fields of any section, by name."""
    fields = {**toy_settings(data), "stage": stage, "train_iters": 10, **options}
    fields["data_path"] = tuple(fields["data_path"])
    config = RunConfig()
    for section in dataclasses.fields(RunConfig):
        value = getattr(config, section.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            mine = {
                field.name: fields.pop(field.name)
                for field in dataclasses.fields(value)
                if field.name in fields
            }
            config = dataclasses.replace(
                config, **{section.name: dataclasses.replace(value, **mine)}
            )
    assert not fields, f"no such options: {sorted(fields)}"
    return config


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The JSON lines that a run wrote, one a step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics without what depends on the clock."""
    rates = ("tokens_per_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu")
    return {
        name: value for name, value in row.items() if name not in rates and not name.endswith("_s")
    }


def weights_of(
    cfg: RunConfig, folder: Path, iteration: int | None = None
) -> tuple["VisionEncoder", "LanguageModel"]:
    """Encoder and language model of a toy run's checkpoint."""
    from megatron_vico.checkpoint import training_checkpoint
    from megatron_vico.checkpoint.run_folder import model_of_run
    from megatron_vico.parallel.groups import started
    from megatron_vico.training.setup import build_modules, named_modules

    model = model_of_run(folder, iteration=iteration)
    with started(cfg.parallel, seed=1, timeout_minutes=1) as groups:
        encoder, chunks = build_modules(cfg, model, groups)
        training_checkpoint.load_weights(
            folder,
            modules=named_modules(encoder, chunks),
            model_size=model.name,
            iteration=iteration,
        )
    return encoder, chunks[0]


def load_tool(name: str) -> ModuleType:
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(
        name, Path(__file__).parents[1] / "tools" / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
