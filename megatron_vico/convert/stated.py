"""What a checkpoint folder of either form says of its use: tiling, decision rule, trained modules.

A Hugging Face folder says it in its JSON files. A run says it in its step's config.yaml, and for
the rest in the files that came with the weights it began with.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_vico import files
from megatron_vico.checkpoint import run_folder
from megatron_vico.config.stages import MODULES, Module
from megatron_vico.convert.huggingface.config import ExportOptions, check_said, said_of_use
from megatron_vico.convert.huggingface.export import GENERATION, PREPROCESSORS, carried_config
from megatron_vico.convert.open import TOKENIZER_FOLDER, is_megatron, open_source

_OF_RUN = ("max_dynamic_patch", "use_thumbnail", "tile_tags")


def stated_options(
    folder: Path, *, iteration: int | None = None, unsaid_rule: Literal["paper", "flash"] = "flash"
) -> ExportOptions:
    """What a run's step (None: the latest) or a Hugging Face folder says; else the defaults.

    Of a run that names no decision rule it is `unsaid_rule`; that of a Hugging Face folder is the
    released models'. CheckpointError if a file cannot be read, or a value is not of its kind.
    """
    if not is_megatron(folder):
        return ExportOptions(**_said_by_files(folder))
    said = {"flash_decision_rule": unsaid_rule} | _said_by_files(folder / TOKENIZER_FOLDER)
    return ExportOptions(**said | _said_by_run(run_folder.find_iteration(folder, iteration)))


def untrained_modules(folder: Path) -> Sequence[Module]:
    """Modules that a folder lacks, or that hold what they were drawn with; none if unknown."""
    if is_megatron(folder):
        trained = run_folder.read_metadata(folder).trained
    else:
        trained = open_source(folder).trained
    return () if trained is None else [name for name in MODULES if name not in trained]


def _said_by_files(folder: Path) -> dict[str, Any]:
    path = str(folder / "config.json")
    said = said_of_use(carried_config(folder) or {}, path=path)
    for name in PREPROCESSORS[:2]:
        if (folder / name).exists():
            contents = files.read_json(folder / name)
            nested = contents.get("image_processor")
            tiles = (nested if isinstance(nested, dict) else contents).get("max_patches")
            said |= {} if tiles is None else {"max_dynamic_patch": tiles}
            check_said(said, path=str(folder / name))
    if (folder / GENERATION).exists():
        generation = files.read_json(folder / GENERATION)
        ids = {name: generation.get(name) for name in ("eos_token_id", "pad_token_id")}
        said = {name: value for name, value in ids.items() if value is not None} | said
        check_said(said, path=str(folder / GENERATION))
    return said


def _said_by_run(step: Path) -> dict[str, Any]:
    path = step / "config.yaml"
    recipe = files.read_yaml(path) if path.exists() else {}  # a conversion's is empty
    names = (*_OF_RUN, "router_granularity") if recipe.get("stage") == "router" else _OF_RUN
    said = {name: recipe[name] for name in names if recipe.get(name) is not None}
    check_said(said, path=str(path))
    return said
