"""How a language model's layers are cut into pipeline stages, and those into chunks.

No torch here, as in registry.py; a layout string is the one thing that is left to megatron-core,
which defines it.
"""

from megatron_vico.config.megatron_options import TransformerOptions
from megatron_vico.config.registry import LanguageConfig
from megatron_vico.config.schema import RunConfig
from megatron_vico.errors import ConfigError

SPLIT_OPTIONS = (
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "pipeline_model_parallel_layout",
)
"""Options that make stages uneven."""


def fixed_stages(options: TransformerOptions) -> dict[str, int]:
    """Option -> layers of the first and last stage, where they are given."""
    names = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
    return {name: layers for name in names if (layers := getattr(options, name)) is not None}


def counted_layers(options: TransformerOptions) -> int:
    """How many of embedding and loss count as a layer."""
    return bool(options.account_for_embedding_in_pipeline_split) + bool(
        options.account_for_loss_in_pipeline_split
    )


def layers_of_a_stage(cfg: RunConfig, language: LanguageConfig) -> int:
    """Layers of a middle pipeline stage, as megatron-core splits them without a layout string.

    Embedding and loss are counted where they are told to count. Of the first stage where its number
    and the last one's are given and nothing is between them; 0 if the layers cannot be shared so.
    """
    fixed = fixed_stages(cfg.transformer)
    layers = language.num_layers + counted_layers(cfg.transformer) - sum(fixed.values())
    middle = cfg.parallel.pipeline_model_parallel_size - len(fixed)
    if middle == 0 and layers == 0:
        return fixed["decoder_first_pipeline_num_layers"]
    return layers // middle if middle > 0 and layers > 0 and layers % middle == 0 else 0


def virtual_stages(cfg: RunConfig, language: LanguageConfig) -> int | None:
    """Chunks of each pipeline stage in the interleaved schedule; None without interleaving.

    Raises:
        ConfigError: if a layout string is given that megatron-core cannot read.
    """
    parallel, layout = cfg.parallel, cfg.transformer.pipeline_model_parallel_layout
    if layout is not None:
        stages = parallel.pipeline_model_parallel_size
        chunks = _chunks_of_layout(layout, stages=stages, num_layers=language.num_layers)
        return chunks if chunks > 1 else None
    if parallel.num_layers_per_virtual_pipeline_stage is None:
        return None
    return layers_of_a_stage(cfg, language) // parallel.num_layers_per_virtual_pipeline_stage


def _chunks_of_layout(layout: str, *, stages: int, num_layers: int) -> int:
    # Only here: the import takes seconds, and few runs have a layout string.
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    try:
        parsed = PipelineParallelLayerLayout(layout, stages)
        parsed.validate_layer_layout(num_layers=num_layers, mtp_num_layers=None)
    # megatron-core has no error class for a bad string: it asserts, and runs into an IndexError on
    # empty parts ("|").
    except (AssertionError, IndexError) as error:
        raise ConfigError(
            f"--pipeline-model-parallel-layout {layout!r} does not lay {num_layers} layers out on"
            f" {stages} pipeline stages ({' '.join(str(error).split())}); write one part a stage"
            f" (or chunk), in order, separated by |, with E, {num_layers} times t, and L, such as"
            f" E{'t' * 2}|t*{max(num_layers - 2, 1)}L."
        ) from error
    return int(parsed.virtual_pipeline_model_parallel_size)
