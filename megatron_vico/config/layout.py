"""Whether a layout fits a model and a number of ranks; megatron-core asserts the same, but late and
without advice.

Every offer in a message was itself put through these checks, so that following it does not lead to
the next error.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megatron_vico.config import pipeline_split
from megatron_vico.config.flags import flag_of
from megatron_vico.config.pipeline_split import SPLIT_OPTIONS
from megatron_vico.config.registry import LanguageConfig, ModelConfig
from megatron_vico.config.schema import ParallelOptions, RunConfig
from megatron_vico.errors import ConfigError

WORLD, BATCH = "world_size", "global_batch_size"
TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
EP, ETP, CHUNK = (
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "num_layers_per_virtual_pipeline_stage",
)
_SIZES = (TP, PP, CHUNK, CP, EP, ETP)
_GROUP = "microbatch_group_size_per_virtual_pipeline_stage"
_MOST_OFFERS = 4
_MOST_TRIED = 256


@dataclass(frozen=True, kw_only=True)
class _Problem:
    """Why a layout cannot work, and what to change."""

    text: str
    """What was found and what was expected, without an end."""

    change: tuple[str, ...] = ()
    """Settings of which other values are tried, one at a time; those that work are offered."""

    advice: str = ""
    """What else would help."""


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """A run seen as a layout."""

    cfg: RunConfig
    model: ModelConfig
    world_size: int

    @property
    def parallel(self) -> ParallelOptions:
        return self.cfg.parallel

    def value(self, name: str) -> int | None:
        """One of `_SIZES`, WORLD or BATCH."""
        if name == WORLD:
            return self.world_size
        found = (
            self.cfg.training.global_batch_size if name == BATCH else getattr(self.parallel, name)
        )
        return found if found is None else int(found)

    def replaced(self, name: str, value: int) -> "_Layout":
        """The same run with another value of one of them."""
        if name == WORLD:
            return dataclasses.replace(self, world_size=value)
        section = "training" if name == BATCH else "parallel"
        changed = dataclasses.replace(getattr(self.cfg, section), **{name: value})
        return dataclasses.replace(self, cfg=dataclasses.replace(self.cfg, **{section: changed}))


def check_layout(cfg: RunConfig, *, model: ModelConfig, world_size: int) -> None:
    """Raises if the layout of a run cannot work.

    Args:
        cfg: the run.
        model: its model.
        world_size: ranks.

    Raises:
        ConfigError: naming both numbers and the nearest that work.
    """
    layout = _Layout(cfg=cfg, model=model, world_size=world_size)
    # What does not fit the model is said first, and mended without regard to the ranks.
    for checks in (_MODEL_CHECKS, _MODEL_CHECKS + _RANK_CHECKS):
        problem = _first_problem(layout, checks)
        if problem is not None:
            raise ConfigError(problem.text + _advice(layout, problem, checks) + ".")


def launched_world_size() -> int:
    """World size as the launcher (torchrun, srun) set it; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def data_parallel_size(parallel: ParallelOptions, world_size: int) -> int:
    """Ranks that read different packs."""
    return world_size // _replica_size(parallel)


def num_microbatches(cfg: RunConfig, world_size: int) -> int:
    """Packs that one rank takes part in during a step."""
    return cfg.training.global_batch_size // data_parallel_size(cfg.parallel, world_size)


def layers_of_a_stage(cfg: RunConfig, language: LanguageConfig) -> int:
    """Layers of a middle pipeline stage, embedding and loss counted where they are told to count; 0
    if not whole."""
    return pipeline_split.layers_of_a_stage(
        language.num_layers,
        stages=cfg.parallel.pipeline_model_parallel_size,
        options=cfg.transformer,
    )


def virtual_stages(cfg: RunConfig, language: LanguageConfig) -> int | None:
    """Chunks of each pipeline stage in the interleaved schedule; None without interleaving."""
    return pipeline_split.virtual_stages(language.num_layers, cfg.parallel, cfg.transformer)


def _size_problem(layout: _Layout) -> _Problem | None:
    for name in (WORLD, *_SIZES):
        size = layout.value(name)
        if size is not None and size < 1:
            return _Problem(text=f"{_shown(name)} is {size}, expected 1 or more")
    return None


def _tensor_problem(layout: _Layout) -> _Problem | None:
    parallel, model, language = layout.parallel, layout.model, layout.model.language
    tensor = parallel.tensor_model_parallel_size
    for name in ("num_query_groups", "num_heads", "ffn_hidden_size"):
        if getattr(language, name) % tensor:
            found = f"does not divide {name} {getattr(language, name)} of {model.name}"
            return _Problem(text=f"{_shown(TP)} {tensor} {found}", change=(TP,))
    if parallel.sequence_parallel and tensor == 1:
        return _Problem(
            text=(
                f"--sequence-parallel shards over the tensor-parallel ranks, and {_shown(TP)} is 1"
            ),
            advice="leave it out, or use 2 or more",
        )
    if language.num_experts is not None and tensor > 1 and not parallel.sequence_parallel:
        return _Problem(
            text=(
                f"{_shown(TP)} {tensor} with the experts of {model.name} needs --sequence-parallel"
            ),
            advice="add it",
        )
    return None


def _expert_problem(layout: _Layout) -> _Problem | None:
    parallel, model, language = layout.parallel, layout.model, layout.model.language
    experts, expert_tensor = (
        parallel.expert_model_parallel_size,
        parallel.expert_tensor_parallel_size,
    )
    if language.num_experts is None:
        idle = {
            f"{_shown(EP)} {experts}": experts > 1,
            f"{_shown(ETP)} {expert_tensor}": expert_tensor is not None,
            "--moe-aux-loss-coeff": bool(parallel.moe_aux_loss_coeff),
        }
        for flag, given in idle.items():
            if given:
                return _Problem(
                    text=f"{flag} has no effect: {model.name} has no experts", advice="leave it out"
                )
        return None
    if language.num_experts % experts:
        found = f"does not divide the {language.num_experts} experts of {model.name}"
        return _Problem(text=f"{_shown(EP)} {experts} {found}", change=(EP,))
    assert language.moe_ffn_hidden_size is not None
    width = expert_tensor or parallel.tensor_model_parallel_size
    if language.moe_ffn_hidden_size % width:
        unset = "" if expert_tensor is not None else f" (unset, so {_shown(TP)})"
        return _Problem(
            text=(
                f"{_shown(ETP)} {width}{unset} does not divide moe_ffn_hidden_size"
                f" {language.moe_ffn_hidden_size} of {model.name}"
            ),
            change=(ETP,),
        )
    return None


def _pipeline_problem(layout: _Layout) -> _Problem | None:
    stages, chunk = layout.parallel.pipeline_model_parallel_size, layout.value(CHUNK)
    options, name = layout.cfg.transformer, layout.model.name
    given = [flag_of(field) for field in SPLIT_OPTIONS if getattr(options, field) is not None]
    if stages == 1:
        idle = [_shown(CHUNK)] * (chunk is not None) + given
        if idle:
            return _Problem(
                text=f"{idle[0]} has no effect: {_shown(PP)} is 1", advice="leave it out"
            )
        return None
    if options.pipeline_model_parallel_layout is not None:
        if chunk is not None or len(given) > 1:
            return _Problem(
                text="--pipeline-model-parallel-layout names the layers of every stage",
                advice=(
                    f"leave out {_shown(CHUNK)}, --decoder-*-pipeline-num-layers and"
                    " --account-for-*"
                ),
            )
        virtual_stages(layout.cfg, layout.model.language)  # reads and checks the string
        return None
    fixed = pipeline_split.fixed_stages(options)
    empty = [flag_of(field) for field, layers in fixed.items() if layers < 1]
    if empty:
        return _Problem(text=f"{empty[0]} is less than 1", advice="leave it out, or use 1 or more")
    if fixed and (
        options.account_for_embedding_in_pipeline_split
        or options.account_for_loss_in_pipeline_split
    ):
        return _Problem(
            text=(
                f"{', '.join(given)} are two ways to make stages uneven, and megatron-core"
                " takes one"
            ),
            advice="use --decoder-*-pipeline-num-layers or --account-for-*",
        )
    layers = layers_of_a_stage(layout.cfg, layout.model.language)
    if not layers:
        return _Problem(
            text=(
                f"the {layout.model.language.num_layers} layers of {name} cannot be shared equally"
                f" by {_shown(PP)} {stages} (with {', '.join(given) or 'no uneven stages'})"
            ),
            change=(PP,),
            advice=_uneven_advice(layout.model.language.num_layers, stages),
        )
    return _chunk_problem(layout, layers) if chunk is not None else None


def _chunk_problem(layout: _Layout, layers: int) -> _Problem | None:
    """What hinders the interleaved schedule, given the layers of a middle stage."""
    chunk = layout.value(CHUNK)
    assert chunk is not None
    change = (CHUNK,) if layers > 1 else ()
    if layers % chunk:
        return _Problem(
            text=f"{_shown(CHUNK)} {chunk} does not divide the {layers} layers of a pipeline stage",
            change=change,
        )
    if layers == chunk:
        return _Problem(
            text=(
                f"{_shown(CHUNK)} {chunk} is all layers of a pipeline stage, so that nothing"
                " interleaves"
            ),
            change=change,
            advice="leave it out",
        )
    for field, fixed in pipeline_split.fixed_stages(layout.cfg.transformer).items():
        if fixed % (layers // chunk):
            return _Problem(
                text=(
                    f"{_shown(CHUNK)} {chunk} cuts the {layers} layers of a stage into"
                    f" {layers // chunk} chunks, and  {flag_of(field)} {fixed} cannot"
                    " be cut into as many"
                ),
                change=(CHUNK,),
            )
    return None


def _uneven_advice(layers: int, stages: int) -> str:
    """Uneven splits that would make the wanted number of stages work."""
    if (layers + 2) % stages == 0:
        flags = "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split"
        return f"count embedding and loss as layers: {flags}"
    if (layers + 1) % stages == 0:
        return "count the loss as a layer: --account-for-loss-in-pipeline-split"
    return "use --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers"


def _context_problem(layout: _Layout) -> _Problem | None:
    parallel, seq_length = layout.parallel, layout.cfg.data.seq_length
    kind = layout.cfg.transformer.cp_comm_type
    if parallel.context_parallel_size == 1:
        if kind is not None:
            return _Problem(
                text=f"--cp-comm-type has no effect: {_shown(CP)} is 1", advice="leave it out"
            )
        return None
    if kind not in (None, "p2p"):
        return _Problem(
            text=f"--cp-comm-type {kind}: packed documents are exchanged in a ring only",
            advice="use p2p, or leave it out",
        )
    unit = 2 * parallel.context_parallel_size
    if unit > seq_length:
        return _Problem(
            text=(
                f"{_shown(CP)} {parallel.context_parallel_size} pads every document to a multiple"
                f" of {unit} tokens, more than --seq-length {seq_length}"
            ),
            change=(CP,),
        )
    return None


def _world_problem(layout: _Layout) -> _Problem | None:
    parallel, world_size = layout.parallel, layout.world_size
    replica = _replica_size(parallel)
    if world_size % replica:
        return _Problem(
            text=(
                f"world size {world_size} is not a multiple of {_product(parallel)} = {replica}"
                " ranks"
            ),
            change=(WORLD, TP, PP, CP),
        )
    width, needed = _expert_width(parallel), _expert_size(parallel)
    if layout.model.language.num_experts is not None and world_size % needed:
        return _Problem(
            text=(
                f"world size {world_size} is not a multiple of {_shown(EP)}"
                f" {parallel.expert_model_parallel_size} x {_shown(ETP)} {width} x {_shown(PP)}"
                f" {parallel.pipeline_model_parallel_size} = {needed}"
            ),
            change=(WORLD, EP, ETP),
        )
    return None


def _batch_problem(layout: _Layout) -> _Problem | None:
    batch, data_parallel = (
        layout.cfg.training.global_batch_size,
        data_parallel_size(layout.parallel, layout.world_size),
    )
    if batch % data_parallel:
        return _Problem(
            text=(
                f"--global-batch-size {batch} is not a multiple of the data-parallel size"
                f" {data_parallel} ({layout.world_size} ranks over {_product(layout.parallel)})"
            ),
            change=(BATCH, WORLD),
        )
    return _interleaving_problem(layout, microbatches=batch // data_parallel)


def _interleaving_problem(layout: _Layout, *, microbatches: int) -> _Problem | None:
    stages, given = (
        layout.parallel.pipeline_model_parallel_size,
        getattr(layout.cfg.transformer, _GROUP),
    )
    if virtual_stages(layout.cfg, layout.model.language) is None:
        if given is not None:
            flag = flag_of(_GROUP)
            return _Problem(
                text=f"{flag} has no effect without interleaving ({_shown(CHUNK)})",
                advice="leave it out",
            )
        return None
    group = given if isinstance(given, int) else stages
    flag = _shown(PP) if given is None else flag_of(_GROUP)
    if group < stages:
        return _Problem(
            text=f"{flag} {group} is less than {_shown(PP)} {stages}",
            advice=f"use {stages} or more",
        )
    if group > microbatches or 0 < microbatches % group < stages:
        data_parallel = data_parallel_size(layout.parallel, layout.world_size)
        return _Problem(
            text=(
                f"the interleaved schedule runs microbatches in groups of {flag} {group}, and there"
                f" are {microbatches} (--global-batch-size {layout.cfg.training.global_batch_size}"
                f" over {data_parallel} data-parallel ranks)"
            ),
            change=(BATCH, WORLD),
            advice="do without interleaving",
        )
    return None


_Check = Callable[[_Layout], _Problem | None]
_MODEL_CHECKS: tuple[_Check, ...] = (
    _size_problem,
    _tensor_problem,
    _expert_problem,
    _pipeline_problem,
    _context_problem,
)
_RANK_CHECKS: tuple[_Check, ...] = (_world_problem, _batch_problem)


def _first_problem(layout: _Layout, checks: Iterable[_Check]) -> _Problem | None:
    return next((found for check in checks if (found := check(layout)) is not None), None)


def _advice(layout: _Layout, problem: _Problem, checks: tuple[_Check, ...]) -> str:
    """What to do about a problem, beginning with its separator."""
    offers = []
    for name in problem.change:
        values = _nearest_that_work(layout, name, checks)
        if values and name == WORLD:
            offers.append(f"{_either(values)} ranks")
        elif values:
            offers.append(
                _either(values) if len(problem.change) == 1 else f"{_shown(name)} {_either(values)}"
            )
    parts = [f"use {', or '.join(offers)}"] if offers else []
    if problem.advice:
        parts.append(f"or {problem.advice}" if offers else problem.advice)
    elif problem.change and not offers:
        parts.append("no other value of one of these works: use smaller parallel sizes")
    return f"; {', '.join(parts)}" if parts else ""


def _nearest_that_work(layout: _Layout, name: str, checks: tuple[_Check, ...]) -> list[int]:
    """Values of one setting with which all else works: of sizes the nearest few, of ranks and packs
    the neighbours."""

    def works(value: int) -> bool:
        try:
            return _first_problem(layout.replaced(name, value), checks) is None
        except ConfigError:  # of a layout string
            return False

    given = layout.value(name)
    wanted = 1 if given is None else given
    if name not in (WORLD, BATCH):
        found = [
            value for value in range(1, _limit(layout, name) + 1) if value != given and works(value)
        ]
        return sorted(sorted(found, key=lambda value: abs(value - wanted))[:_MOST_OFFERS])
    unit = (
        data_parallel_size(layout.parallel, layout.world_size)
        if name == BATCH
        else _replica_size(layout.parallel)
    )
    if name == WORLD and layout.model.language.num_experts is not None:
        unit = math.lcm(unit, _expert_size(layout.parallel))
    # More data-parallel ranks than packs cannot work; of packs, a few groups of microbatches are
    # far enough.
    most = (
        layout.cfg.training.global_batch_size * unit
        if name == WORLD
        else wanted + _MOST_TRIED * unit
    )
    below = range(wanted // unit * unit, 0, -unit)
    above = range((wanted // unit + 1) * unit, most + 1, unit)
    near = [
        next((value for value in values if value != wanted and works(value)), None)
        for values in (below, above)
    ]
    return [value for value in near if value is not None]


def _limit(layout: _Layout, name: str) -> int:
    """The largest value of a size that can make sense."""
    language = layout.model.language
    most = {
        TP: language.num_query_groups,
        PP: language.num_layers + 2,
        CHUNK: language.num_layers,
        CP: layout.world_size,
        EP: language.num_experts or 1,
        ETP: language.num_query_groups,
    }
    return most[name]


def _replica_size(parallel: ParallelOptions) -> int:
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def _expert_width(parallel: ParallelOptions) -> int:
    return parallel.expert_tensor_parallel_size or parallel.tensor_model_parallel_size


def _expert_size(parallel: ParallelOptions) -> int:
    return (
        parallel.expert_model_parallel_size
        * _expert_width(parallel)
        * parallel.pipeline_model_parallel_size
    )


def _product(parallel: ParallelOptions) -> str:
    return (
        f"tensor {parallel.tensor_model_parallel_size} x pipeline"
        f" {parallel.pipeline_model_parallel_size} x context {parallel.context_parallel_size}"
    )


def _shown(name: str) -> str:
    return "the world size" if name == WORLD else "--" + name.replace("_", "-")


def _either(values: list[int]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
