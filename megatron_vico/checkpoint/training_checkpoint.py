"""Training checkpoints: weights, optimizer and the loop's own state through megatron-core's
dist_checkpointing.

    SAVE/latest_checkpointed_iteration.txt   the newest finished step, written last
    SAVE/iter_0000100/ megatron-core's torch_dist files, checkpoint.json, config.yaml


A step's folder has the suffix .incomplete until every rank has written its part, so what an
interrupted save leaves behind is never taken for a checkpoint, and the one before it stays the
latest. Tensors are stored under parameter names and in global shapes, those of the optimizer too,
so that every layout reads what any other wrote.
"""

import contextlib
import logging
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint import CheckpointException

from megatron_vico.checkpoint.extra_state import leave_out_unstored, load_state
from megatron_vico.errors import CheckpointError, cause_of, listed
from megatron_vico.files import (
    INCOMPLETE_SUFFIX,
    read_json,
    refuse_incomplete,
    write_json,
    write_text,
)

LATEST_FILE = "latest_checkpointed_iteration.txt"

Modules = Mapping[str, MegatronModule | Sequence[MegatronModule]]
"""By name, outside of DDP: a module, or the chunks of it that a pipeline rank has, in the order of
the layers."""

_METADATA_FILE, _CONFIG_FILE = "checkpoint.json", "config.yaml"
_FORMAT_VERSION = 1

# What megatron-core's parts are asked for: the distributed optimizer's state under parameter names
# and in their shapes, which every layout can read, at the price of gathering it over the
# data-parallel ranks at each save.
_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


@dataclass(frozen=True, kw_only=True)
class CheckpointMetadata:
    """What a checkpoint is, for people and for the checks before it is read."""

    model_size: str
    """Name in config/registry.py."""

    stage: str
    """The stage that wrote it, or `converted`."""

    has_optimizer: bool = False
    """Whether training can resume from it; filled in when it is saved."""

    iteration: int = 0
    """Optimizer steps of the stage; filled in when it is saved."""

    layout: str = ""
    """Parallel sizes it was saved under, to be read by people: any layout can load it; filled in
    when it is saved."""

    optimizer: Literal["replicated", "distributed"] | None = None
    """Kind of its optimizer; None where it has none or was saved before this was noted. Filled in
    when it is saved."""

    format_version: int = _FORMAT_VERSION


def save_checkpoint(
    directory: str | Path,
    iteration: int,
    *,
    modules: Modules,
    metadata: CheckpointMetadata,
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    trainer_state: dict[str, Any] | None = None,
    config_yaml: str = "",
) -> Path:
    """Write a checkpoint and make it the latest; called by every rank.

    Args:
        directory: of the run; the step gets a folder in it.
        iteration: optimizer steps done.
        modules: what is saved; a module's name is the prefix of its tensors.
        metadata: what this is.
        optimizer: of these modules, after at least one step (before it there is no state); unset,
            weights only.
        scheduler: of the learning rate.
        trainer_state: the loop's own, equal on every rank: numbers, strings, tensors, and lists and
            dicts of them.
        config_yaml: the resolved configuration, stored beside it.

    Returns:
        The step's folder.

    Raises:
        CheckpointError: if the disk is full or cannot be written; names the last good checkpoint.
    """
    root = Path(directory)
    target = iteration_folder(root, iteration)
    unfinished = target.with_name(target.name + INCOMPLETE_SUFFIX)
    facts = replace(
        metadata,
        has_optimizer=optimizer is not None,
        iteration=iteration,
        layout=_describe_layout(modules),
        optimizer=None if optimizer is None else _kind(optimizer),
    )

    def begin() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def finish() -> None:
        describe(unfinished, facts, config_yaml=config_yaml)
        _replace_folder(unfinished, target)
        point_to(root, iteration)

    try:
        _on_main_rank(begin)
        state = _sharded_state(modules, optimizer, is_loading=False)
        state["scheduler"] = scheduler.state_dict() if scheduler is not None else {}
        state["trainer_state"] = trainer_state or {}
        # Every rank reaches the collectives inside: a rank whose write failed reports it through
        # them.
        with _quiet():
            dist_checkpointing.save(state, str(unfinished))
        _on_main_rank(finish)
    except (OSError, CheckpointingException, CheckpointException) as error:
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise CheckpointError(
            f"could not save {target}: {cause_of(error)}; {_last_good(root)}"
        ) from error
    return target


def describe(folder: Path, metadata: CheckpointMetadata, *, config_yaml: str = "") -> None:
    """Write what a step's folder is beside its tensors."""
    write_json(folder / _METADATA_FILE, asdict(metadata))
    (folder / _CONFIG_FILE).write_text(config_yaml, encoding="utf-8")


def point_to(directory: Path, iteration: int) -> None:
    """Make a finished step the latest of a run."""
    write_text(directory / LATEST_FILE, f"{iteration}\n")


def load_checkpoint(
    directory: str | Path,
    *,
    modules: Modules,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    model_size: str,
    iteration: int | None = None,
) -> dict[str, Any]:
    """Put a checkpoint's weights, optimizer and scheduler state back in place, to resume; called by
    every rank.

    Args:
        directory: of the run.
        modules: as in `save_checkpoint`; of the same size, in any layout.
        optimizer: of these modules.
        scheduler: of the learning rate.
        model_size: name of the modules' size, compared with the checkpoint's.
        iteration: which step; unset, the latest.

    Returns:
        The trainer_state that was saved with it.

    Raises:
        CheckpointError: if it is no checkpoint, of another size, or lacks what is asked for.
    """
    folder = find_iteration(directory, iteration)
    metadata = _checked_metadata(folder, model_size)
    if not metadata.has_optimizer:
        raise CheckpointError(
            f"{folder} holds weights only, so training cannot resume from it; give it as"
            " --pretrained-checkpoint."
        )
    if metadata.optimizer not in (None, _kind(optimizer)):
        raise CheckpointError(
            f"{folder} has the state of a {metadata.optimizer} optimizer, this run's is"
            f" {_kind(optimizer)}; resume with --use-distributed-optimizer as it was saved, or give"
            " it as --pretrained-checkpoint to start from its weights."
        )
    loaded = _load(folder, modules, optimizer)
    try:
        with (
            torch.no_grad()
        ):  # in fp32 the distributed optimizer copies into views of leaf parameters
            optimizer.load_state_dict(loaded["optimizer"])
        scheduler.load_state_dict(loaded["scheduler"])
    except (KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise CheckpointError(
            f"{folder}, saved under {metadata.layout or 'an unknown layout'}: the optimizer's state"
            f" does not fit this run's: {cause_of(error)}; resume with the stage, the trained"
            " modules, the learning rates and the optimizer it was saved with, or give it as"
            " --pretrained-checkpoint to start from its weights."
        ) from error
    trainer_state: dict[str, Any] = loaded["trainer_state"]
    return trainer_state


def load_weights(
    directory: str | Path, *, modules: Modules, model_size: str, iteration: int | None = None
) -> CheckpointMetadata:
    """Load weights only, to start another stage or to evaluate; called by every rank, before an
    optimizer is built.

    Args:
        directory: of the run.
        modules: as in `save_checkpoint`; may be fewer than were saved.
        model_size: name of the modules' size.
        iteration: which step; unset, the latest.

    Returns:
        What the checkpoint is.

    Raises:
        CheckpointError: if it is no checkpoint, of another size, or lacks a tensor.
    """
    folder = find_iteration(directory, iteration)
    metadata = _checked_metadata(folder, model_size)
    _load(folder, modules, None)
    return metadata


def has_checkpoint(directory: str | Path) -> bool:
    """Whether a folder holds a run that can be resumed, rather than nothing yet."""
    return latest_iteration(directory) is not None


def read_metadata(directory: str | Path, iteration: int | None = None) -> CheckpointMetadata:
    """What a checkpoint is, without reading its tensors.

    Args:
        directory: of the run.
        iteration: which step; unset, the latest.

    Returns:
        Its metadata.

    Raises:
        CheckpointError: if it is no checkpoint of this project.
    """
    path = find_iteration(directory, iteration) / _METADATA_FILE
    contents = read_json(path)
    if contents.get("format_version") != _FORMAT_VERSION:
        found = contents.get("format_version")
        raise CheckpointError(
            f"{path}: format version {found}, this program reads {_FORMAT_VERSION}."
        )
    try:
        return CheckpointMetadata(**contents)
    except TypeError as error:
        raise CheckpointError(f"{path} is not a checkpoint's metadata: {error}.") from error


def weight_dtypes(
    directory: str | Path, *, modules: Iterable[str], iteration: int | None = None
) -> frozenset[torch.dtype]:
    """The number formats a checkpoint's weights are stored in.

    Args:
        directory: of the run.
        modules: names of the modules looked at.
        iteration: which step; unset, the latest.

    Returns:
        The formats.
    """
    prefixes = tuple(f"{name}." for name in modules)
    stored = _stored(find_iteration(directory, iteration))
    tensors = {key: each for key, each in stored.items() if isinstance(each, ShardedTensor)}
    return frozenset(each.dtype for key, each in tensors.items() if key.startswith(prefixes))


def iteration_folder(directory: str | Path, iteration: int) -> Path:
    """Where the checkpoint of a step is."""
    return Path(directory) / f"iter_{iteration:07d}"


def latest_iteration(directory: str | Path) -> int | None:
    """The newest finished step of a run; None before the first.

    Raises:
        CheckpointError: if the pointer file holds no number.
    """
    path = Path(directory) / LATEST_FILE
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8").strip()
    if not text.isdecimal():
        raise CheckpointError(
            f"{path} holds {text[:40]!r}, expected a step; write that of a finished folder into it."
        )
    return int(text)


def find_iteration(directory: str | Path, iteration: int | None = None) -> Path:
    """The folder of a step, of the latest where none is given; CheckpointError where there is
    none."""
    root = Path(directory)
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such folder; give the folder of --save of a former run.")
    refuse_incomplete(root)
    step = latest_iteration(root) if iteration is None else iteration
    if step is None:
        raise CheckpointError(f"{root} is not a checkpoint folder: it has no {LATEST_FILE}.")
    folder = iteration_folder(root, step)
    if not (folder / _METADATA_FILE).is_file():
        finished = [each.parent.name for each in sorted(root.glob(f"iter_*/{_METADATA_FILE}"))]
        finished = [name for name in finished if not name.endswith(INCOMPLETE_SUFFIX)]
        raise CheckpointError(
            f"{folder} is no finished checkpoint; finished here: {', '.join(finished) or 'none'}."
        )
    return folder


def _checked_metadata(folder: Path, model_size: str) -> CheckpointMetadata:
    metadata = read_metadata(folder.parent, int(folder.name.removeprefix("iter_")))
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
        "virtual pipeline": [
            config.virtual_pipeline_model_parallel_size or 1 for config in configs
        ],
        "context parallel": [config.context_parallel_size for config in configs],
        "expert parallel": [config.expert_model_parallel_size for config in configs],
        "expert tensor parallel": [
            config.expert_tensor_parallel_size or 1 if config.num_moe_experts else 1
            for config in configs
        ],
    }
    split = [f"{name} {max(each)}" for name, each in sizes.items() if max(each) > 1]
    return ", ".join([f"{world_size} ranks" if world_size > 1 else "1 rank", *split])


def _kind(optimizer: MegatronOptimizer) -> Literal["replicated", "distributed"]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return (
        "distributed"
        if any(isinstance(part, DistributedOptimizer) for part in parts)
        else "replicated"
    )


def _sharded_state(
    modules: Modules, optimizer: MegatronOptimizer | None, *, is_loading: bool
) -> dict[str, Any]:
    """The state as dist_checkpointing wants it; modules apart, for each has data-parallel groups of
    its own."""
    weights: dict[str, dict[int, Any]] = {}
    for name, module in modules.items():
        # Dicts, not lists: megatron-core joins this with what the saving rank had, which may be
        # other chunks.
        weights[name] = {
            index: chunk.sharded_state_dict(
                prefix=f"{name}.",
                metadata={**_SHARDING, "dp_cp_group": _data_parallel_group(chunk)},
            )
            for index, chunk in enumerate(_chunks(module))
        }
    state: dict[str, Any] = {"modules": weights}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            weights, is_loading=is_loading, metadata=dict(_SHARDING)
        )
    return state


def _data_parallel_group(module: MegatronModule) -> torch.distributed.ProcessGroup:
    found = (getattr(part, "pg_collection", None) for part in module.modules())
    return next(groups for groups in found if groups is not None).dp_cp


def _load(folder: Path, modules: Modules, optimizer: MegatronOptimizer | None) -> dict[str, Any]:
    state = _sharded_state(modules, optimizer, is_loading=True)
    stored = _stored(folder)
    _check_tensors(folder, state, modules, stored)
    for chunks in state["modules"].values():
        for weights in chunks.values():
            leave_out_unstored(weights, stored=stored)
    try:
        with _quiet():
            loaded = dist_checkpointing.load(
                state, str(folder), strict=StrictHandling.ASSUME_OK_UNEXPECTED
            )
    except (OSError, CheckpointingException, CheckpointException, RuntimeError) as error:
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
        part.key: part.without_data() for each in nested_values(state) for part in _tensors_of(each)
    }
    # Of all ranks, for a pipeline stage has a part of the names; and so that all ranks come to the
    # same verdict.
    everyones: list[dict[str, ShardedTensor]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyones, own)
    asked = {key: part for parts in everyones for key, part in parts.items()}
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
        # A vocabulary padded to another number of ranks is allowed to differ: megatron-core takes
        # what both have, and zeros beyond.
        if found != expected and not part.allow_shape_mismatch:
            raise CheckpointError(f"{folder}: {key} is {found}, the model's is {expected}.")


def _stored(folder: Path) -> dict[str, Any]:
    """Tensors by key, objects by unique key."""
    try:
        with _quiet():
            stored: dict[str, Any] = load_sharded_metadata(str(folder))
    except (
        OSError,
        CheckpointingException,
        CheckpointException,
        pickle.UnpicklingError,
        EOFError,
    ) as error:
        raise CheckpointError(
            f"{folder} is not a readable checkpoint: {cause_of(error)}."
        ) from error
    return stored


def _tensors_of(value: Any) -> list[ShardedTensor]:
    if isinstance(value, ShardedTensor):
        return [value]
    if isinstance(value, dist_checkpointing.mapping.ShardedTensorFactory):
        return [each for each in nested_values(value.build()) if isinstance(each, ShardedTensor)]
    return []


def _on_main_rank(action: Callable[[], None]) -> None:
    """Do something with files once; if it fails, every rank raises, so that none waits for the
    others."""
    failure: list[str | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            action()
        except OSError as error:
            failure = [str(error)]
    torch.distributed.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise OSError(failure[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep megatron-core's and torch's notes about each other's deprecated parts, which no user can
    act on, to them."""
    logger = logging.getLogger("megatron.core.dist_checkpointing.strategies.torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"torch\.distributed\.")
            yield
    finally:
        logger.setLevel(level)


def _replace_folder(source: Path, target: Path) -> None:
    # A step may be written twice (a resumed run); the old folder goes only when the new one is
    # whole.
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
