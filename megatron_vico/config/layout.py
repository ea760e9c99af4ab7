"""Whether a layout fits a model and its ranks; megatron-core asserts it late, without advice.

The checks are iterators over problems, of which the first one is told: the later ones rely on what
the earlier ones let through.
"""

import math
import os
from collections.abc import Iterator

from megatron_vico.config.pipeline_split import (
    SPLIT_OPTIONS,
    counted_layers,
    fixed_stages,
    layers_of_a_stage,
    virtual_stages,
)
from megatron_vico.config.registry import ModelConfig
from megatron_vico.config.schema import ParallelOptions, RunConfig, flag_of
from megatron_vico.errors import ConfigError

TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
CP, EP = "--context-parallel-size", "--expert-model-parallel-size"
ETP, CHUNK = "--expert-tensor-parallel-size", "--num-layers-per-virtual-pipeline-stage"
GROUP = "--microbatch-group-size-per-virtual-pipeline-stage"

Problems = Iterator[str]
"""What is wrong: found, expected, and the fix."""


def check_layout(cfg: RunConfig, *, model: ModelConfig, world_size: int) -> None:
    """Raises ConfigError if the layout of a run cannot work on so many ranks."""
    for problem in layout_problems(cfg, model, world_size):
        raise ConfigError(problem)


def layout_problems(cfg: RunConfig, model: ModelConfig, world_size: int) -> Problems:
    """Why a layout, of sizes that are 1 or more, cannot work."""
    yield from _tensor(cfg.parallel, model)
    yield from _experts(cfg.parallel, model)
    yield from _pipeline(cfg, model)
    yield from _context(cfg)
    yield from _world(cfg.parallel, model, world_size)
    yield from _batch(cfg, model, world_size)


def launched_world_size() -> int:
    """World size as the launcher (torchrun, srun) set it; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def data_parallel_size(parallel: ParallelOptions, world_size: int) -> int:
    """Ranks that read different packs."""
    return world_size // replica_size(parallel)


def num_microbatches(cfg: RunConfig, world_size: int) -> int:
    """Packs that one rank takes part in during a step."""
    return cfg.training.global_batch_size // data_parallel_size(cfg.parallel, world_size)


def replicas_in_step(parallel: ParallelOptions, model: ModelConfig) -> int:
    """Neighbouring replicas that wait for each other in every microbatch: they share experts.

    megatron-core lays expert groups over the tensor, context and data-parallel ranks of a stage, in
    this order.
    """
    if model.language.num_experts is None:
        return 1
    ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    experts = parallel.expert_model_parallel_size * _expert_width(parallel)
    return math.lcm(ranks, experts) // ranks


def _tensor(parallel: ParallelOptions, model: ModelConfig) -> Problems:
    language, tensor = model.language, parallel.tensor_model_parallel_size
    names = ("num_query_groups", "num_heads", "ffn_hidden_size")
    fitting = _divisors_of(math.gcd(*(getattr(language, name) for name in names)))
    if parallel.sequence_parallel:
        fitting.remove(1)
    for name in names:
        size = getattr(language, name)
        if size % tensor:
            yield (
                f"{TP} {tensor} does not divide {name} {size} of {model.name}; use"
                f" {_either(fitting)}."
            )
    if parallel.sequence_parallel and tensor == 1:
        yield (
            f"--sequence-parallel shards over the tensor-parallel ranks, and {TP} is 1; leave it"
            " out, or use 2 or more."
        )
    if language.num_experts is not None and tensor > 1 and not parallel.sequence_parallel:
        yield (f"{TP} {tensor} with the experts of {model.name} needs --sequence-parallel; add it.")


def _experts(parallel: ParallelOptions, model: ModelConfig) -> Problems:
    language, expert_tensor = model.language, parallel.expert_tensor_parallel_size
    experts = parallel.expert_model_parallel_size
    if language.num_experts is None:
        idle = {
            f"{EP} {experts}": experts > 1,
            f"{ETP} {expert_tensor}": expert_tensor is not None,
            "--moe-aux-loss-coeff": bool(parallel.moe_aux_loss_coeff),
        }
        for flag, given in idle.items():
            if given:
                yield f"{flag} has no effect: {model.name} has no experts; leave it out."
        return
    if language.num_experts % experts:
        yield (
            f"{EP} {experts} does not divide the {language.num_experts} experts of {model.name};"
            f" use {_divisors(language.num_experts)}."
        )
    assert language.moe_ffn_hidden_size is not None
    width = _expert_width(parallel)
    if language.moe_ffn_hidden_size % width:
        unset = "" if expert_tensor is not None else f" (unset, so {TP})"
        yield (
            f"{ETP} {width}{unset} does not divide moe_ffn_hidden_size"
            f" {language.moe_ffn_hidden_size} of {model.name}; use"
            f" {_divisors(language.moe_ffn_hidden_size)}."
        )


def _pipeline(cfg: RunConfig, model: ModelConfig) -> Problems:
    options, num_layers = cfg.transformer, model.language.num_layers
    stages = cfg.parallel.pipeline_model_parallel_size
    chunk = cfg.parallel.num_layers_per_virtual_pipeline_stage
    given = [flag_of(name) for name in SPLIT_OPTIONS if getattr(options, name) is not None]
    if stages == 1:
        for flag in [CHUNK] * (chunk is not None) + given:
            yield f"{flag} has no effect: {PP} is 1; leave it out."
        return
    if options.pipeline_model_parallel_layout is not None:
        if chunk is not None or len(given) > 1:
            yield (
                "--pipeline-model-parallel-layout names the layers of every stage; leave out"
                f" {CHUNK}, --decoder-*-pipeline-num-layers and --account-for-*."
            )
        virtual_stages(cfg, model.language)  # reads and checks the string
        return
    fixed = fixed_stages(options)
    counted = counted_layers(options)
    if fixed and counted:
        yield (
            f"{', '.join(given)} are two ways to make stages uneven, and megatron-core takes one;"
            " use --decoder-*-pipeline-num-layers or --account-for-*."
        )
    layers = layers_of_a_stage(cfg, model.language)
    if not layers:
        rest = num_layers + counted - sum(fixed.values())
        fitting = [size + len(fixed) for size in _divisors_of(rest)]
        sizes = f"use {_either(fitting)}, or " if fitting else ""
        if not fixed and (num_layers + 2) % stages == 0:
            uneven = (
                "count embedding and loss as layers: --account-for-embedding-in-pipeline-split"
                " --account-for-loss-in-pipeline-split"
            )
        elif not fixed and (num_layers + 1) % stages == 0:
            uneven = "count the loss as a layer: --account-for-loss-in-pipeline-split"
        else:
            uneven = (
                "use --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers"
            )
        yield (
            f"the {num_layers} layers of {model.name} cannot be shared equally by {PP} {stages}"
            f" (with {', '.join(given) or 'no uneven stages'}); {sizes}{uneven}."
        )
    if chunk is not None:
        yield from _chunks(chunk, layers, fixed)


def _chunks(chunk: int, layers: int, fixed: dict[str, int]) -> Problems:
    """What hinders the interleaved schedule, given the layers of a middle stage."""
    # The first and last stage are cut into as many chunks as the others.
    fitting = [layers // chunks for chunks in _divisors_of(math.gcd(layers, *fixed.values()))]
    smaller = sorted(size for size in fitting if size < layers)
    advice = f"use {_either(smaller)}, or leave it out" if smaller else "leave it out"
    if layers % chunk:
        yield f"{CHUNK} {chunk} does not divide the {layers} layers of a pipeline stage; {advice}."
    if layers == chunk:
        yield (
            f"{CHUNK} {chunk} is all layers of a pipeline stage, so that nothing interleaves;"
            f" {advice}."
        )
    for name, size in fixed.items():
        if size % (layers // chunk):
            yield (
                f"{CHUNK} {chunk} cuts the {layers} layers of a stage into {layers // chunk}"
                f" chunks, and {flag_of(name)} {size} cannot be cut into as many; {advice}."
            )


def _context(cfg: RunConfig) -> Problems:
    context, seq_length = cfg.parallel.context_parallel_size, cfg.data.seq_length
    exchange = cfg.transformer.cp_comm_type
    if context == 1 and exchange is not None:
        yield f"--cp-comm-type has no effect: {CP} is 1; leave it out."
    if exchange not in (None, "p2p"):
        yield (
            f"--cp-comm-type {exchange}: packed documents are exchanged in a ring only; use p2p, or"
            " leave it out."
        )
    if context > 1 and 2 * context > seq_length:
        yield (
            f"{CP} {context} pads every document to a multiple of {2 * context} tokens, more than"
            f" --seq-length {seq_length}; use {seq_length // 2} or less."
        )


def _world(parallel: ParallelOptions, model: ModelConfig, world_size: int) -> Problems:
    stages, experts = parallel.pipeline_model_parallel_size, parallel.expert_model_parallel_size
    needed, width = replica_size(parallel), _expert_width(parallel)
    has_experts = model.language.num_experts is not None
    for_experts = experts * width * stages if has_experts else 1
    fitting = _either(_multiples_near(world_size, math.lcm(needed, for_experts)))
    if world_size % needed:
        yield (
            f"world size {world_size} is not a multiple of {_product(parallel)} = {needed} ranks;"
            f" use {fitting} ranks, or smaller sizes."
        )
    if world_size % for_experts:
        yield (
            f"world size {world_size} is not a multiple of {EP} {experts} x {ETP} {width} x {PP}"
            f" {stages} = {for_experts}; use {fitting} ranks, or smaller sizes."
        )


def _batch(cfg: RunConfig, model: ModelConfig, world_size: int) -> Problems:
    batch, stages = cfg.training.global_batch_size, cfg.parallel.pipeline_model_parallel_size
    data_parallel = data_parallel_size(cfg.parallel, world_size)
    if batch % data_parallel:
        yield (
            f"--global-batch-size {batch} is not a multiple of the data-parallel size"
            f" {data_parallel} ({world_size} ranks over {_product(cfg.parallel)}); use"
            f" {_either(_multiples_near(batch, data_parallel))}."
        )
    given = cfg.transformer.microbatch_group_size_per_virtual_pipeline_stage
    if virtual_stages(cfg, model.language) is None:
        if given is not None:
            yield f"{GROUP} has no effect without interleaving ({CHUNK}); leave it out."
        return
    group, microbatches = given or stages, batch // data_parallel
    if group < stages:
        yield f"{GROUP} {group} is less than {PP} {stages}; use {stages} or more."
    if group > microbatches or 0 < microbatches % group < stages:
        flag = PP if given is None else GROUP
        yield (
            f"the interleaved schedule runs microbatches in groups of {flag} {group}, and there are"
            f" {microbatches} (--global-batch-size {batch} over {data_parallel} data-parallel"
            f" ranks); use --global-batch-size"
            f" {_either(_multiples_near(batch, group * data_parallel))}, or do without"
            " interleaving."
        )


def replica_size(parallel: ParallelOptions) -> int:
    """Ranks that share one model replica."""
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def _expert_width(parallel: ParallelOptions) -> int:
    return parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size


def _product(parallel: ParallelOptions) -> str:
    return (
        f"tensor {parallel.tensor_model_parallel_size} x pipeline"
        f" {parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size}"
    )


def _divisors_of(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _divisors(number: int) -> str:
    return _either(_divisors_of(number))


def _multiples_near(number: int, unit: int) -> list[int]:
    below = number // unit * unit
    return [multiple for multiple in (below, below + unit) if multiple]


def _either(values: list[int]) -> str:
    """`1`, `1 or 2`, `1, 2 or 4`; of many the first ones."""
    words = [str(value) for value in values[:16]]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
