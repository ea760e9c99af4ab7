"""Checkpoints converted by four ranks, loaded under several layouts and saved there."""

from dataclasses import replace
from pathlib import Path

from megatron_vico.checkpoint import training_checkpoint
from megatron_vico.checkpoint.run_folder import iteration_folder
from megatron_vico.config.registry import MODELS, ModelConfig, get_model_config
from megatron_vico.convert.convert import convert
from megatron_vico.convert.options import ConversionOptions
from megatron_vico.errors import CheckpointError
from tests.checkpoint_runs import make_training
from tests.distributed.cached_layouts import CachedLayouts
from tests.distributed.layouts_checkpoint import LAYOUTS

LOADED_UNDER = {
    "toy-6b": ("tp2", "pp2", "tp2-pp2"),
    "toy-moe": ("ep2", "ep2-tp2"),
    "odd": ("pp2",),
    "odd-halves": ("tp2", "tp2-pp2"),
    "odd-moe": ("pp2",),
    "odd-moe-halves": ("ep2", "ep2-tp2"),
}
MAX_SHARD_BYTES = 50_000
"""Small, so that toys make several files and each process has some to write."""


def odd_models() -> dict[str, ModelConfig]:
    """Models of four layers whose heads, experts, widths and vocabulary divide by nothing, or by
    two just once."""

    def odd(name: str, base: str, **language: int) -> ModelConfig:
        model = get_model_config(base)
        vision = replace(model.vision, hidden_size=28, num_heads=7)
        return replace(
            model,
            name=name,
            vision=vision,
            language=replace(model.language, num_layers=4, vocab_size=301, **language),
        )

    models = (
        odd("odd", "toy-6b", num_heads=9, num_query_groups=3, ffn_hidden_size=45),
        odd("odd-halves", "toy-6b", num_heads=6, num_query_groups=2, ffn_hidden_size=46),
        odd(
            "odd-moe",
            "toy-moe",
            num_heads=9,
            num_query_groups=3,
            num_experts=5,
            moe_ffn_hidden_size=15,
        ),
        odd(
            "odd-moe-halves",
            "toy-moe",
            num_heads=6,
            num_query_groups=2,
            num_experts=6,
            moe_ffn_hidden_size=14,
        ),
    )
    return {model.name: model for model in models}


def load_and_save(folder: Path) -> None:
    """All sizes, on every rank: FOLDER/SIZE is a Hugging Face folder; what is converted by all
    ranks goes to FOLDER/SIZE-megatron, what a layout saves to FOLDER/SIZE-LAYOUT."""
    MODELS.update(odd_models())
    layouts = CachedLayouts()
    for size, names in LOADED_UNDER.items():
        megatron = convert(
            folder / size,
            output=folder / f"{size}-megatron",
            layout="megatron",
            options=ConversionOptions(max_shard_bytes=MAX_SHARD_BYTES, verify=True),
        )
        for name in names:
            groups = layouts.switch_to(LAYOUTS[name])
            # Other values before loading: what is not loaded shows.
            modules = make_training(size, groups=groups, seed=2, parallel=LAYOUTS[name]).modules
            training_checkpoint.load_weights(megatron, modules=modules, model_size=size)
            metadata = training_checkpoint.CheckpointMetadata(model_size=size, stage="pretrain")
            training_checkpoint.save_checkpoint(
                iteration_folder(folder / f"{size}-{name}", 1), modules=modules, metadata=metadata
            )
    convert(folder / "base", output=folder / "start", layout="megatron")


def told_of_a_conversion(source: Path, output: Path) -> str:
    """The error with which a conversion ends on this rank."""
    try:
        convert(source, output=output, layout="megatron")
    except CheckpointError as error:
        return str(error)
    return ""
