"""Training checkpoints: weights, optimizer and the loop's state by mcore's dist_checkpointing.

A step's folder has the suffix .incomplete until every rank has written its part, so what an
interrupted save leaves behind is never taken for a checkpoint, and the one before it stays the
latest. Tensors are stored under parameter names and in global shapes, those of the optimizer too,
so that every layout reads what any other wrote. The files: run_folder.py.
"""

import contextlib
import logging
import os
import pickle
import queue
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint import CheckpointException

from megatron_vico.checkpoint import optimizer_state
from megatron_vico.checkpoint.extra_state import leave_out_unstored, load_state
from megatron_vico.checkpoint.frozen import add_frozen, take_frozen, tensors_of
from megatron_vico.checkpoint.integrity import Sum, require_intact, write_checksums
from megatron_vico.checkpoint.ranks import Ranks
from megatron_vico.checkpoint.restricted_pickle import check_objects
from megatron_vico.checkpoint.run_folder import (
    CheckpointMetadata,
    find_iteration,
    iteration_folder,
    iteration_of,
    latest_iteration,
    point_to,
    read_metadata,
    write_metadata,
)
from megatron_vico.errors import CheckpointError, cause_of, listed
from megatron_vico.files import INCOMPLETE_SUFFIX, unfinished_path

Modules = Mapping[str, MegatronModule | Sequence[MegatronModule]]
"""By name, outside of DDP: a module, or the chunks of it that a pipeline rank has, in the order of
the layers."""

_FAILURES = (OSError, CheckpointingException, CheckpointException)

_SHARDING = {"singleton_local_shards": False}


def save_checkpoint(
    target: Path,
    *,
    modules: Modules,
    metadata: CheckpointMetadata,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    trainer_state: dict[str, Any] | None = None,
    config_yaml: str = "",
    earlier: Path | None = None,
) -> Path:
    """Write a checkpoint and make it the latest; called by every rank.

    Args:
        target: `iteration_folder` of the optimizer steps done; it is returned.
        modules: what is saved; a module's name is the prefix of its tensors.
        metadata: from `metadata_of`.
        optimizer: of these modules, after at least one step (before it there is no state); unset,
            weights only.
        trainer_state: the loop's own, equal on every rank: numbers, strings, tensors, and lists and
            dicts of them.
        config_yaml: the resolved configuration, stored beside it.
        earlier: a checkpoint with the same frozen weights, see `frozen.add_frozen`.

    Raises:
        CheckpointError: if the disk is full or cannot be written; names the last good checkpoint.
    """
    root, iteration = target.parent, iteration_of(target)
    unfinished = unfinished_path(target)
    facts = replace(
        metadata,
        has_optimizer=optimizer is not None,
        iteration=iteration,
        layout=_describe_layout(modules),
        optimizer=None if optimizer is None else optimizer_state.kind_of(optimizer),
    )

    def begin() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def finish() -> None:
        _replace_folder(unfinished, target)
        point_to(root, iteration)

    ranks = Ranks.of_run()
    try:
        ranks.on_main(begin)
        state = _sharded_state(modules, optimizer, is_loading=False)
        state["scheduler"] = scheduler.state_dict() if scheduler is not None else {}
        state["trainer_state"] = trainer_state or {}
        known: dict[str, Sum] = {}
        frozen = None
        if optimizer is not None:
            chunks = {name: dict(enumerate(_chunks(each))) for name, each in modules.items()}
            frozen = take_frozen(state["modules"], chunks, ranks=ranks)
        _write(state, unfinished)
        if frozen is not None and frozen.formats:
            known = add_frozen(unfinished, frozen, earlier=earlier, write=_write, ranks=ranks)
        ranks.on_main(lambda: write_metadata(unfinished, facts, config_yaml=config_yaml))
        write_checksums(unfinished, ranks=ranks, known=known)
        ranks.on_main(finish)
    except _FAILURES as error:
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        message = f"could not save {target}: {cause_of(error)}; {_last_good(root)}"
        raise CheckpointError(message) from error
    return target


def load_checkpoint(
    directory: str | Path,
    *,
    modules: Modules,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    model_size: str,
    iteration: int | None = None,
) -> dict[str, Any]:
    """Load all to resume from a step (unset: the latest); called by every rank.

    The modules are of the same size, in any layout. Returns the trainer_state that was saved.

    Raises:
        CheckpointError: if it is no checkpoint, damaged, of another size, or lacks what is asked
            for.
    """
    folder = find_iteration(directory, iteration)
    metadata = _checked_metadata(folder, model_size)
    if not metadata.has_optimizer:
        raise CheckpointError(
            f"{folder} holds weights only, so training cannot resume from it; give it as"
            " --pretrained-checkpoint."
        )
    kind = optimizer_state.kind_of(optimizer)
    if metadata.optimizer not in (None, kind):
        raise CheckpointError(
            f"{folder} has the state of a {metadata.optimizer} optimizer, this run's is"
            f" {kind}; resume with --use-distributed-optimizer as it was saved, or give it as"
            " --pretrained-checkpoint to start from its weights."
        )
    loaded = _load(folder, modules, optimizer)
    try:
        with torch.no_grad():  # in fp32 the distributed one copies into views of leaf parameters
            optimizer_state.load_state(optimizer, loaded["optimizer"])
        scheduler.load_state_dict(loaded["scheduler"])
    except (KeyError, ValueError, RuntimeError, AssertionError) as error:
        cause = optimizer_state.differing_settings(optimizer, loaded["optimizer"])
        cause = cause or cause_of(error)
        raise CheckpointError(
            f"{folder}, saved under {metadata.layout or 'an unknown layout'}: the optimizer's state"
            f" does not fit this run's: {cause}; resume with the stage, the trained modules, the"
            " learning rates and the optimizer it was saved with, or give it as"
            " --pretrained-checkpoint to start from its weights."
        ) from error
    trainer_state: dict[str, Any] = loaded["trainer_state"]
    return trainer_state


def load_weights(
    directory: str | Path, *, modules: Modules, model_size: str, iteration: int | None = None
) -> None:
    """Load weights only, to start another stage or to evaluate; before an optimizer is built.

    The modules may be fewer than were saved. Errors are those of `load_checkpoint`.
    """
    folder = find_iteration(directory, iteration)
    _checked_metadata(folder, model_size)
    _load(folder, modules, None)


def _write(state: dict[str, Any], folder: Path) -> None:
    """Called by every rank: one whose write failed reports it through the collectives inside."""
    # What the writing threads report stays in this process. megatron-core would start another one
    # for the queue, with a torch of its own: it outlives a killed run, and a SIGTERM to all
    # processes of a job ends it before the checkpoint that the signal asks for is written.
    filesystem_async._results_queue = queue.Queue()
    with quiet():
        dist_checkpointing.save(state, str(folder))


def _checked_metadata(folder: Path, model_size: str) -> CheckpointMetadata:
    metadata = read_metadata(folder.parent, iteration_of(folder))
    if metadata.model_size != model_size:
        raise CheckpointError(
            f"{folder} is of {metadata.model_size}, this run is of {model_size}; set --model-size."
        )
    return metadata


def _chunks(module: MegatronModule | Sequence[MegatronModule]) -> Sequence[MegatronModule]:
    return module if isinstance(module, Sequence) else [module]


def _describe_layout(modules: Modules) -> str:
    configs = [chunk.config for module in modules.values() for chunk in _chunks(module)]
    world_size = torch.distributed.get_world_size()
    sizes = {
        "tensor parallel": [config.tensor_model_parallel_size for config in configs],
        "pipeline parallel": [config.pipeline_model_parallel_size for config in configs],
        "virtual pipeline": [each.virtual_pipeline_model_parallel_size or 1 for each in configs],
        "context parallel": [config.context_parallel_size for config in configs],
        "expert parallel": [config.expert_model_parallel_size for config in configs],
        "expert tensor parallel": [
            each.expert_tensor_parallel_size or 1 if each.num_moe_experts else 1 for each in configs
        ],
    }
    split = [f"{name} {max(each)}" for name, each in sizes.items() if max(each) > 1]
    return ", ".join([f"{world_size} ranks" if world_size > 1 else "1 rank", *split])


def _sharded_state(
    modules: Modules, optimizer: MegatronOptimizer | None, *, is_loading: bool
) -> dict[str, Any]:
    """The state as dist_checkpointing wants it; each module has its own data-parallel groups."""
    weights: dict[str, dict[int, Any]] = {}
    for name, module in modules.items():
        # Dicts, not lists: megatron-core joins this with the saving rank's, maybe of other chunks.
        weights[name] = {
            index: chunk.sharded_state_dict(
                prefix=f"{name}.", metadata=_SHARDING | {"dp_cp_group": _data_parallel_group(chunk)}
            )
            for index, chunk in enumerate(_chunks(module))
        }
    state: dict[str, Any] = {"modules": weights}
    if optimizer is not None:
        state["optimizer"] = optimizer_state.sharded_state(
            optimizer, weights, is_loading=is_loading
        )
    return state


def _data_parallel_group(module: MegatronModule) -> torch.distributed.ProcessGroup:
    found = (getattr(part, "pg_collection", None) for part in module.modules())
    return next(groups for groups in found if groups is not None).dp_cp


def _load(folder: Path, modules: Modules, optimizer: MegatronOptimizer | None) -> dict[str, Any]:
    # Before anything in it is unpickled.
    if not require_intact(folder, ranks=Ranks.of_run()) and torch.distributed.get_rank() == 0:
        print(
            f"note: {folder} was saved without checksums: a damaged weight would not be seen",
            flush=True,
        )
    state = _sharded_state(modules, optimizer, is_loading=True)
    stored = _stored(folder)
    _check_tensors(folder, state, modules, stored)
    for chunks in state["modules"].values():
        for weights in chunks.values():
            leave_out_unstored(weights, stored=stored)
    try:
        with quiet():
            loaded = dist_checkpointing.load(
                state, str(folder), strict=StrictHandling.ASSUME_OK_UNEXPECTED
            )
    except (*_FAILURES, RuntimeError) as error:
        raise CheckpointError(f"could not read {folder}: {cause_of(error)}.") from error
    for name, module in modules.items():
        prefix = f"{name}."
        for index, chunk in enumerate(_chunks(module)):
            weights = loaded["modules"][name][index]
            load_state(chunk, {key.removeprefix(prefix): each for key, each in weights.items()})
    return loaded


def _check_tensors(
    folder: Path, state: dict[str, Any], modules: Iterable[str], stored: dict[str, Any]
) -> None:
    """Compare names and global shapes before anything is read, so that the error can list them."""
    stored = {key: each for key, each in stored.items() if isinstance(each, ShardedTensor)}
    own = {
        part.key: part.without_data() for each in nested_values(state) for part in tensors_of(each)
    }
    # Of all ranks, since a pipeline stage has a part of the names, and so that all of them agree.
    asked = {key: part for parts in Ranks.of_run().gather(own) for key, part in parts.items()}
    absent = asked.keys() - stored.keys()
    prefixes = tuple(f"{name}." for name in modules)
    unknown = {key for key in stored.keys() - asked.keys() if key.startswith(prefixes)}
    if absent or unknown:
        raise CheckpointError(
            f"{folder} does not fit the model: it lacks {listed(absent)}; it has, beyond the model,"
            f" {listed(unknown)}."
        )
    for key, part in asked.items():
        found, expected = tuple(stored[key].global_shape), tuple(part.global_shape)
        # A vocabulary padded for other ranks may differ: megatron-core takes what both have.
        if found != expected and not part.allow_shape_mismatch:
            raise CheckpointError(f"{folder}: {key} is {found}, the model's is {expected}.")


def _stored(folder: Path) -> dict[str, Any]:
    """Tensors by key, objects by unique key."""
    check_objects(folder)
    try:
        with quiet():
            stored: dict[str, Any] = load_sharded_metadata(str(folder))
    except (*_FAILURES, pickle.UnpicklingError, EOFError) as error:
        message = f"{folder} is not a readable checkpoint: {cause_of(error)}."
        raise CheckpointError(message) from error
    return stored


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out megatron-core's and torch's notes of deprecated parts and of saving alone."""
    logger = logging.getLogger("megatron.core.dist_checkpointing.strategies.torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.distributed\.")
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    finally:
        logger.setLevel(level)


def _replace_folder(source: Path, target: Path) -> None:
    # A step may be written twice (a resumed run); the old folder goes when the new one is whole.
    old = target.with_name(target.name + ".old" + INCOMPLETE_SUFFIX)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(source, target)
    shutil.rmtree(old, ignore_errors=True)


def _last_good(root: Path) -> str:
    try:
        step = latest_iteration(root)
    except CheckpointError:
        step = None
    if step is None:
        return "there is no earlier checkpoint of this run."
    # megatron-core's error does not say that a disk was full; the space left does.
    free = f"{shutil.disk_usage(root).free / 1e9:.1f} GB are free there"
    return (
        f"{free}; the last good checkpoint is {iteration_folder(root, step)}, from which the run"
        " can be resumed."
    )
