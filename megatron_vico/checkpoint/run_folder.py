"""A run's folder: which steps it holds, and what each of them says it is.

    SAVE/latest_checkpointed_iteration.txt    the newest finished step, written last
    SAVE/iter_0000100/checkpoint.json         CheckpointMetadata
    SAVE/iter_0000100/config.yaml             the resolved configuration
    SAVE/iter_0000100/*                       megatron-core's torch_dist files
    SAVE/iter_0000100/checksums.json          of all of these files (integrity.py)

No torch here: the size of a model is asked for before anything heavy is imported.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vico.config.config_json import CHECKPOINT, differences, model_named
from megatron_vico.config.registry import MODELS, ModelConfig, get_model_config, model_from_fields
from megatron_vico.config.schema import RunConfig
from megatron_vico.config.stages import Module
from megatron_vico.errors import CheckpointError, ConfigError
from megatron_vico.files import read_json, record_of, refuse_incomplete, write_json, write_text

LATEST_FILE = "latest_checkpointed_iteration.txt"

_METADATA_FILE, _CONFIG_FILE = "checkpoint.json", "config.yaml"
_FORMAT_VERSION = 1
_STEP = re.compile(r"\d{1,18}", re.ASCII)
_STEP_FOLDER = re.compile(r"iter_(\d{1,18})", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class CheckpointMetadata:
    """What a checkpoint is, for people and for the checks before it is read."""

    model_size: str
    """Name of the model: a preset's, or that of `description`."""

    description: ModelConfig | None = None
    """The model where it is no preset; the key `model` of the file, absent where this is None."""

    stage: str
    """The stage that wrote it, or `converted`."""

    trained: tuple[Module, ...] | None = None
    """Modules that this stage or one before trained, or that came with the weights; the others hold
    what they were drawn with. None where it was saved before this was noted."""

    has_optimizer: bool = False
    """Whether training can resume from it; filled in, as all below, when it is saved."""

    iteration: int = 0
    """Optimizer steps of the stage."""

    layout: str = ""
    """Parallel sizes it was saved under, to be read by people: any layout can load it."""

    optimizer: Literal["replicated", "distributed"] | None = None
    """Type of its optimizer; None where it has none or was saved before this was noted."""

    format_version: int = _FORMAT_VERSION

    @property
    def model(self) -> ModelConfig:
        """The model; ConfigError if the name is of no preset and nothing describes it."""
        return self.description or get_model_config(self.model_size)


def metadata_of(
    model: ModelConfig, *, stage: str, layout: str = "", trained: Sequence[Module] | None = None
) -> CheckpointMetadata:
    """What a new checkpoint of a model says; the rest is filled in when it is saved."""
    return CheckpointMetadata(
        model_size=model.name,
        description=None if MODELS.get(model.name) == model else model,
        stage=stage,
        layout=layout,
        trained=None if trained is None else tuple(trained),
    )


def write_metadata(folder: Path, metadata: CheckpointMetadata, *, config_yaml: str = "") -> None:
    """Write what a step's folder is beside its tensors."""
    contents = asdict(metadata)
    description = contents.pop("description")
    if description is not None:
        contents["model"] = description
    if metadata.trained is None:
        del contents["trained"]
    write_json(folder / _METADATA_FILE, contents)
    (folder / _CONFIG_FILE).write_text(config_yaml, encoding="utf-8")


def read_metadata(directory: str | Path, iteration: int | None = None) -> CheckpointMetadata:
    """What the checkpoint of a step (None: the latest) is; CheckpointError if it is none."""
    path = find_iteration(directory, iteration) / _METADATA_FILE
    contents = read_json(path)
    if contents.get("format_version") != _FORMAT_VERSION:
        found = contents.get("format_version")
        raise CheckpointError(
            f"{path}: format version {found}, this program reads {_FORMAT_VERSION}."
        )
    try:
        description: dict[str, Any] | None = contents.pop("model", None)
        if isinstance(trained := contents.get("trained"), list):
            contents["trained"] = tuple(trained)
        model = None if description is None else model_from_fields(description)
        return record_of(CheckpointMetadata, contents | {"description": model})
    except (TypeError, KeyError, ConfigError) as error:
        raise CheckpointError(f"{path} is not a checkpoint's metadata: {error}.") from error


def model_of_run(
    directory: str | Path, *, iteration: int | None = None, expected: str | None = None
) -> ModelConfig:
    """The model of a run's checkpoint (None: the latest).

    CheckpointError if it is none, or not what --model-size says (`expected`, if that is set).
    """
    model = read_metadata(directory, iteration).model
    if expected not in (None, CHECKPOINT, model.name):
        wanted = model_named(expected)
        differing = differences(model, wanted)
        if differing:
            raise CheckpointError(
                f"{find_iteration(directory, iteration)} is of {model.name}, expected"
                f" {wanted.name}: {'; '.join(differing)}; set --model-size."
            )
    return model


def resolve_model(cfg: RunConfig) -> ModelConfig:
    """The model of a run: --model-size, or else that of the checkpoint the run starts from.

    ConfigError if there is no such model, or `checkpoint` is said where none is loaded.
    """
    size, files = cfg.model.model_size, cfg.checkpoint
    if size not in (None, CHECKPOINT):
        return model_named(size)
    if files.load is not None and has_checkpoint(files.load):
        return model_of_run(files.load, iteration=files.ckpt_step)
    if files.pretrained_checkpoint is not None:
        if not Path(files.pretrained_checkpoint).exists():
            raise ConfigError(
                f"--pretrained-checkpoint {files.pretrained_checkpoint}: no such file or folder"
                f" (looked from {Path.cwd()}), so that the size of the model is not known; correct"
                " it, or name the size with --model-size."
            )
        return model_of_run(files.pretrained_checkpoint)
    if size is None:
        return get_model_config("toy")
    raise ConfigError(
        f"--model-size {CHECKPOINT}: there is no --pretrained-checkpoint, and none in --load"
        f" ({files.load}); name a size, or give the path of a config.json."
    )


def iteration_folder(directory: str | Path, iteration: int) -> Path:
    """Where the checkpoint of a step is."""
    return Path(directory) / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int:
    """The step of an `iteration_folder`."""
    return int(folder.name.removeprefix("iter_"))


def point_to(directory: Path, iteration: int) -> None:
    """Make a finished step the latest of a run."""
    write_text(directory / LATEST_FILE, f"{iteration}\n")


def has_checkpoint(directory: str | Path) -> bool:
    """Whether a folder holds a run that can be resumed, rather than nothing yet."""
    return latest_iteration(directory) is not None


def latest_iteration(directory: str | Path) -> int | None:
    """The newest finished step of a run; None before the first.

    CheckpointError if the pointer file holds no number, or is gone while there are steps.
    """
    root, path = Path(directory), Path(directory) / LATEST_FILE
    steps = finished_steps(root)
    if not path.is_file():
        if not steps:
            return None
        raise CheckpointError(
            f"{root} has finished checkpoints ({_named(root, steps)}) but no {LATEST_FILE}, so"
            f" whether they count is not known: {resume_command(root, steps[-1])} goes on from the"
            " newest; to begin at step 0, move them away."
        )
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if not _STEP.fullmatch(text):
        raise CheckpointError(
            f"{path} holds {text[:40]!r}, expected a step, one of those finished:"
            f" {_named(root, steps)}"
            + (f"; {resume_command(root, steps[-1])} goes on from the newest." if steps else ".")
        )
    return int(text)


def finished_steps(directory: str | Path) -> list[int]:
    """The steps of a run whose checkpoints were written to their end, in order."""
    names = (path.parent.name for path in Path(directory).glob(f"iter_*/{_METADATA_FILE}"))
    return sorted(int(found[1]) for name in names if (found := _STEP_FOLDER.fullmatch(name)))


def resume_command(root: Path, step: int) -> str:
    """The shell command that makes a step the one that runs go on from."""
    return f"`echo {step} > {shlex.quote(str(root / LATEST_FILE))}`"


def _named(root: Path, steps: Sequence[int]) -> str:
    return ", ".join(iteration_folder(root, step).name for step in steps) or "none"


def refuse_hugging_face(folder: Path) -> None:
    """Raise CheckpointError for a Hugging Face folder where a run's is wanted."""
    is_one = (folder / "config.json").exists() or any(folder.glob("*.safetensors*"))
    if is_one and not (folder / LATEST_FILE).exists():
        raise CheckpointError(
            f"{folder} is a Hugging Face folder, not a run's; convert it first: vico convert --from"
            f" hf --to megatron --input {folder} --output FOLDER."
        )


def find_iteration(directory: str | Path, iteration: int | None = None) -> Path:
    """The folder of a step, or of the latest; CheckpointError where there is none."""
    root = Path(directory)
    if not root.is_dir():
        raise CheckpointError(f"{root}: no such folder; give the folder of --save of a former run.")
    refuse_incomplete(root)
    refuse_hugging_face(root)
    step = latest_iteration(root) if iteration is None else iteration
    if step is None:
        raise CheckpointError(f"{root} is not a checkpoint folder: it has no {LATEST_FILE}.")
    folder = iteration_folder(root, step)
    if not (folder / _METADATA_FILE).is_file():
        steps = finished_steps(root)
        command = ""
        if steps and iteration is None:
            command = f"; {resume_command(root, steps[-1])} goes on from the newest"
        raise CheckpointError(
            f"{folder} is no finished checkpoint; finished here: {_named(root, steps)}{command}."
        )
    return folder
