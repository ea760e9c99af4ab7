"""Whether a layout fits a model and a number of ranks; megatron-core asserts the same, but late and without advice."""

from megatron_vico.config.megatron_flags import TRANSFORMER, flag_of
from megatron_vico.config.schema import ParallelOptions, RunConfig
from megatron_vico.errors import ConfigError
from megatron_vico.models.registry import LanguageConfig, ModelConfig

_LAYOUT_FIELDS = (
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
)


def check_layout(cfg: RunConfig, *, model: ModelConfig, world_size: int) -> None:
    """Raises if the layout of a run cannot work.

    Args:
        cfg: the run.
        model: its model.
        world_size: ranks.

    Raises:
        ConfigError: naming both numbers and the nearest that work.
    """
    _check_sizes(cfg.parallel, world_size)
    _check_tensor(cfg.parallel, model)
    _check_experts(cfg.parallel, model)
    _check_pipeline(cfg, model)
    _check_world(cfg.parallel, world_size)
    _check_batch(cfg, data_parallel_size(cfg.parallel, world_size))


def data_parallel_size(parallel: ParallelOptions, world_size: int) -> int:
    """Ranks that read different packs."""
    return world_size // _replica_size(parallel)


def num_microbatches(cfg: RunConfig, world_size: int) -> int:
    """Packs that one rank takes part in during a step."""
    return cfg.training.global_batch_size // data_parallel_size(cfg.parallel, world_size)


def layers_of_a_stage(cfg: RunConfig, language: LanguageConfig) -> int:
    """Layers of a middle pipeline stage, embedding and loss counted where they are told to count; 0 if not whole."""
    given = cfg.transformer_overrides
    ends = [given.get("num_layers_in_first_pipeline_stage"), given.get("num_layers_in_last_pipeline_stage")]
    fixed = [int(layers) for layers in ends if isinstance(layers, int)]
    counted = sum(bool(given.get(f"account_for_{part}_in_pipeline_split", False)) for part in ("embedding", "loss"))
    stages = cfg.parallel.pipeline_model_parallel_size - len(fixed)
    layers = language.num_layers + counted - sum(fixed)
    return layers // stages if stages > 0 and layers > 0 and layers % stages == 0 else 0


def _check_sizes(parallel: ParallelOptions, world_size: int) -> None:
    sizes = {
        "the world size": world_size,
        "--tensor-model-parallel-size": parallel.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": parallel.pipeline_model_parallel_size,
        "--context-parallel-size": parallel.context_parallel_size,
        "--expert-model-parallel-size": parallel.expert_model_parallel_size,
        "--expert-tensor-parallel-size": parallel.expert_tensor_parallel_size,
        "--num-layers-per-virtual-pipeline-stage": parallel.num_layers_per_virtual_pipeline_stage,
    }
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"{name} is {size}, expected 1 or more")


def _check_tensor(parallel: ParallelOptions, model: ModelConfig) -> None:
    tensor, language = parallel.tensor_model_parallel_size, model.language
    for name in ("num_query_groups", "num_heads", "ffn_hidden_size"):
        if getattr(language, name) % tensor:
            raise ConfigError(
                f"--tensor-model-parallel-size {tensor} does not divide {name} {getattr(language, name)} of "
                f"{model.name}; use {_either(_divisors(language.num_query_groups))}."
            )
    if parallel.sequence_parallel and tensor == 1:
        raise ConfigError(
            "--sequence-parallel shards over the tensor-parallel ranks, and --tensor-model-parallel-size is 1; "
            "leave it out, or use 2 or more."
        )
    if language.num_experts is not None and tensor > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            f"--tensor-model-parallel-size {tensor} with the experts of {model.name} needs --sequence-parallel; add it."
        )


def _check_experts(parallel: ParallelOptions, model: ModelConfig) -> None:
    language = model.language
    experts, expert_tensor = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    if language.num_experts is None:
        if experts > 1 or expert_tensor is not None:
            flag = f"--expert-model-parallel-size {experts}"
            if experts == 1:
                flag = f"--expert-tensor-parallel-size {expert_tensor}"
            raise ConfigError(f"{flag} has no effect: {model.name} has no experts; leave it out.")
        if parallel.moe_aux_loss_coeff:
            raise ConfigError(f"--moe-aux-loss-coeff has no effect: {model.name} has no experts; leave it out.")
        return
    if language.num_experts % experts:
        raise ConfigError(
            f"--expert-model-parallel-size {experts} does not divide the {language.num_experts} experts of "
            f"{model.name}; use {_either(_divisors(language.num_experts))}."
        )
    assert language.moe_ffn_hidden_size is not None
    if expert_tensor is not None and language.moe_ffn_hidden_size % expert_tensor:
        raise ConfigError(
            f"--expert-tensor-parallel-size {expert_tensor} does not divide moe_ffn_hidden_size "
            f"{language.moe_ffn_hidden_size} of {model.name}; use 1 (best with experts this small)."
        )


def _check_pipeline(cfg: RunConfig, model: ModelConfig) -> None:
    stages, chunk = cfg.parallel.pipeline_model_parallel_size, cfg.parallel.num_layers_per_virtual_pipeline_stage
    given = [flag_of(TRANSFORMER, name) for name in _LAYOUT_FIELDS if name in cfg.transformer_overrides]
    if stages == 1:
        if chunk is not None or given:
            flag = "--num-layers-per-virtual-pipeline-stage" if chunk is not None else given[0]
            raise ConfigError(f"{flag} has no effect: --pipeline-model-parallel-size is 1; leave it out.")
        return
    if "--pipeline-model-parallel-layout" in given:
        # megatron-core reads and checks the layout string itself; it says all that the other flags say.
        if chunk is not None or len(given) > 1:
            raise ConfigError(
                "--pipeline-model-parallel-layout names the layers of every stage: leave out "
                "--num-layers-per-virtual-pipeline-stage, --decoder-*-pipeline-num-layers and --account-for-*."
            )
        return
    layers = layers_of_a_stage(cfg, model.language)
    if not layers:
        raise ConfigError(
            f"the {model.language.num_layers} layers of {model.name} cannot be shared equally by "
            f"--pipeline-model-parallel-size {stages} (with {', '.join(given) or 'no uneven stages'}); "
            + _pipeline_advice(model.language.num_layers, stages)
        )
    if chunk is not None and layers % chunk:
        raise ConfigError(
            f"--num-layers-per-virtual-pipeline-stage {chunk} does not divide the {layers} layers of a pipeline stage; "
            f"use {_either(_divisors(layers)[:-1] or [1])}."
        )


def _pipeline_advice(layers: int, stages: int) -> str:
    """Pipeline sizes near the wanted one, and uneven splits that would make the wanted one work."""
    whole = [size for size in _divisors(layers) if size > 1]
    nearest = sorted(sorted(whole, key=lambda size: abs(size - stages))[:3])
    advice = [f"use {_either(nearest)}"] if nearest else []
    if (layers + 2) % stages == 0:
        advice.append(
            "or count embedding and loss as layers: --account-for-embedding-in-pipeline-split "
            "--account-for-loss-in-pipeline-split"
        )
    elif (layers + 1) % stages == 0:
        advice.append("or count the loss as a layer: --account-for-loss-in-pipeline-split")
    return ", ".join(advice or ["use --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers"]) + "."


def _check_world(parallel: ParallelOptions, world_size: int) -> None:
    replica = _replica_size(parallel)
    if world_size % replica:
        raise ConfigError(
            f"world size {world_size} is not a multiple of {_product(parallel)} = {replica} ranks; "
            f"use {_either(_multiples(world_size, replica))} ranks, or smaller parallel sizes."
        )
    experts = parallel.expert_model_parallel_size
    width = parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size
    needed = experts * width * parallel.pipeline_model_parallel_size
    if experts > 1 and world_size % needed:
        raise ConfigError(
            f"world size {world_size} is not a multiple of --expert-model-parallel-size {experts} x "
            f"--expert-tensor-parallel-size {width} x --pipeline-model-parallel-size "
            f"{parallel.pipeline_model_parallel_size} = {needed}; use {_either(_multiples(world_size, needed))} ranks."
        )


def _check_batch(cfg: RunConfig, data_parallel: int) -> None:
    batch, stages = cfg.training.global_batch_size, cfg.parallel.pipeline_model_parallel_size
    if batch % data_parallel:
        raise ConfigError(
            f"--global-batch-size {batch} is not a multiple of the data-parallel size {data_parallel} "
            f"(the ranks over {_product(cfg.parallel)}); use {_either(_multiples(batch, data_parallel))}."
        )
    microbatches = batch // data_parallel
    if cfg.parallel.num_layers_per_virtual_pipeline_stage is not None and microbatches % stages:
        raise ConfigError(
            f"--num-layers-per-virtual-pipeline-stage runs microbatches in groups of "
            f"--pipeline-model-parallel-size {stages}, and there are {microbatches} (--global-batch-size {batch} over "
            f"{data_parallel} data-parallel ranks); use --global-batch-size "
            f"{_either(_multiples(batch, stages * data_parallel))}, or no interleaving."
        )


def _replica_size(parallel: ParallelOptions) -> int:
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


def _product(parallel: ParallelOptions) -> str:
    return (
        f"tensor {parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} x "
        f"context {parallel.context_parallel_size}"
    )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _multiples(number: int, unit: int) -> list[int]:
    """The multiples of `unit` just below and above `number`."""
    return [size for size in (number // unit * unit, (number // unit + 1) * unit) if size]


def _either(values: list[int]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
