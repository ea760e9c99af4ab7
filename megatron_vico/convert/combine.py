"""Combine an InternViT and a Qwen3 checkpoint: what a first pretraining starts from.

Together they are an InternVL3.5 folder without connector_4x: names get the prefix they have there,
and nothing is read. Where the language model ties its head to its embedding, as Qwen3 does up to
4B, the head is a copy of the embedding, for InternVL3.5 ties no size.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megatron_vico.config.config_json import read_model
from megatron_vico.config.registry import ModelConfig
from megatron_vico.convert.huggingface.config import Json
from megatron_vico.convert.huggingface.safetensors_folder import SafetensorsFolder, open_folder
from megatron_vico.convert.initial import CONNECTOR_4X
from megatron_vico.convert.names.internvl import entries
from megatron_vico.convert.open import files_source
from megatron_vico.convert.options import Layout
from megatron_vico.convert.source import Source, problems_of
from megatron_vico.errors import CheckpointError
from megatron_vico.files import read_json

_LANGUAGE = "language_model."
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class _Tower:
    """How a vision tower's folder becomes part of an InternVL3.5 folder."""

    layout: Layout
    prefix: str
    """Of its tensors in that layout."""

    model_type: str
    language_config: str
    """Name of the language model's part of that layout's config.json."""


# By model_type of the tower's own config.json: the remote code's (of both towers, in all releases),
# and transformers'.
_TOWERS = {
    "intern_vit_6b": _Tower(
        layout="internvl",
        prefix="vision_model.",
        model_type="internvl_chat",
        language_config="llm_config",
    ),
    "internvl_vision": _Tower(
        layout="hf", prefix="vision_tower.", model_type="internvl", language_config="text_config"
    ),
}


def open_parts(vit: str | Path, llm: str | Path, *, model_size: str | None = None) -> Source:
    """A folder of InternViT and one of Qwen3 or Qwen3-MoE as one source without connectors.

    Args:
        vit: folder of the tower alone, in the remote code's form (as OpenGVLab releases it) or in
            transformers' own.
        llm: folder of the language model alone; its tokenizer is the one to extend.
        model_size: the size that they should make; unset, any.

    Raises:
        CheckpointError: if a folder is broken or holds another kind of model, if the two do not fit
            together or are not of the expected size, or if a tensor is missing or unknown.
    """
    vision, language = open_folder(vit), open_folder(llm)
    vision_path, language_path = vision.path / "config.json", language.path / "config.json"
    vision_config, language_config = read_json(vision_path), read_json(language_path)
    tower = _TOWERS.get(str(vision_config.get("model_type")))
    if tower is None:
        raise CheckpointError(
            f"{vision_path}: model_type is {vision_config.get('model_type')!r}, expected"
            f" {' or '.join(map(repr, _TOWERS))}; give the folder of a vision tower alone as --vit."
        )
    is_tied = bool(language_config.pop("tie_word_embeddings", False))
    joined: Json = {
        "model_type": tower.model_type,
        "vision_config": vision_config,
        tower.language_config: language_config,
    }
    where = f"{vision_path} with {language_path}"
    model = read_model(joined, path=where, expected=model_size)

    tensors = {tower.prefix + name: stored for name, stored in vision.tensors.items()}
    tensors |= {_LANGUAGE + name: stored for name, stored in language.tensors.items()}
    if is_tied and _HEAD not in language.tensors and _EMBEDDING in language.tensors:
        tensors[_LANGUAGE + _HEAD] = language.tensors[_EMBEDDING]
    rows = entries(model, layout=tower.layout).values()
    wanted = [name for row in rows for name in row.files]
    for folder, prefix in ((vision, tower.prefix), (language, _LANGUAGE)):
        _check_names(folder.path, prefix, found=tensors, wanted=wanted, model=model)
    both = SafetensorsFolder(path=language.path, tensors=tensors)
    return files_source(both, model=model, layout=tower.layout, without=(CONNECTOR_4X,))


def _check_names(
    path: Path, prefix: str, *, found: Collection[str], wanted: Collection[str], model: ModelConfig
) -> None:
    """Compare one part's names, in the folder's own spelling."""
    own = {name.removeprefix(prefix) for name in found if name.startswith(prefix)}
    expected = {name.removeprefix(prefix) for name in wanted if name.startswith(prefix)}
    if own == expected:
        return
    hint = ""
    if _HEAD in expected - own:
        hint = f" A language model without {_HEAD} has tie_word_embeddings in its config.json."
    problems = "; ".join(problems_of(own, expected))
    raise CheckpointError(f"{path}, as a part of {model.name}: {problems}.{hint}")
