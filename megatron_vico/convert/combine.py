"""A vision tower and a language model that have never met, an InternViT and a Qwen3 folder, as if
they were one folder.

That is what a first pretraining starts from. Together they look like an InternVL3.5 folder without
connector_4x: names get the prefix they have there, and nothing is read. Where the language model
ties its head to its embedding, as Qwen3 does up to 4B, the head is a copy of the embedding, for
InternVL3.5 ties no size.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_vico.config.config_json import Json, read_model
from megatron_vico.config.registry import ModelConfig
from megatron_vico.convert.huggingface.safetensors_folder import (
    SafetensorsFolder,
    StoredTensor,
    open_folder,
)
from megatron_vico.convert.names.internvl import Layout, entries
from megatron_vico.errors import CheckpointError, listed
from megatron_vico.files import read_json

_LANGUAGE = "language_model."
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class _VisionForm:
    layout: Layout
    prefix: str
    """Of its tensors in that layout."""

    language_config: str
    """Name of the language model's part of that layout's config.json."""


# By model_type of the tower's own config.json: the remote code's (of both towers, in all releases),
# and transformers'.
_VISION_FORMS = {
    "intern_vit_6b": _VisionForm(
        layout="internvl", prefix="vision_model.", language_config="llm_config"
    ),
    "internvl_vision": _VisionForm(
        layout="hf", prefix="vision_tower.", language_config="text_config"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Two folders that look like one `SafetensorsFolder`; only headers have been read."""

    path: Path
    """The language model's folder: its tokenizer is the one to extend."""

    model: ModelConfig
    """The size whose tower and language model these are."""

    layout: Layout
    """Whose names the tensors have: `internvl`, or `hf` where the tower is in transformers' own
    form."""

    tensors: dict[str, StoredTensor]
    """By name in that layout; there is no connector."""

    origins: Mapping[str, tuple[SafetensorsFolder, str]]
    """Where each is, and what it is called there."""

    def read(self, name: str) -> Tensor:
        """One tensor.

        Args:
            name: a key of `tensors`.

        Returns:
            It, as stored.
        """
        folder, stored_name = self.origins[name]
        return folder.read(stored_name)


def open_parts(vit: str | Path, llm: str | Path, *, model_size: str | None = None) -> Parts:
    """Open a folder of InternViT and one of Qwen3 or Qwen3-MoE, and find the size that consists of
    them.

    Args:
        vit: folder of the tower alone, in the remote code's form (as OpenGVLab releases it) or in
            transformers' own.
        llm: folder of the language model alone.
        model_size: the size it should be; unset, any known one.

    Returns:
        The two as one.

    Raises:
        CheckpointError: if a folder is broken or holds another kind of model, if the two are of no
            known size or not of the expected one (with what differs), or if a tensor is missing or
            unknown.
    """
    tower, language = open_folder(vit), open_folder(llm)
    vision_config, language_config = (
        read_json(tower.path / "config.json"),
        read_json(language.path / "config.json"),
    )
    form = _VISION_FORMS.get(str(vision_config.get("model_type")))
    if form is None:
        raise CheckpointError(
            f"{tower.path / 'config.json'}: model_type is {vision_config.get('model_type')!r},"
            f" expected {' or '.join(map(repr, _VISION_FORMS))}; give the folder of a vision tower"
            " alone as --vit."
        )
    is_tied = bool(language_config.get("tie_word_embeddings"))
    joined: Json = {
        "model_type": "internvl" if form.layout == "hf" else "internvl_chat",
        "vision_config": vision_config,
        form.language_config: {
            name: value for name, value in language_config.items() if name != "tie_word_embeddings"
        },
    }
    where = f"{tower.path / 'config.json'} with {language.path / 'config.json'}"
    model = read_model(joined, path=where, expected=model_size)

    origins = {form.prefix + name: (tower, name) for name in tower.tensors}
    origins |= {_LANGUAGE + name: (language, name) for name in language.tensors}
    if is_tied and _HEAD not in language.tensors and _EMBEDDING in language.tensors:
        origins[_LANGUAGE + _HEAD] = (language, _EMBEDDING)
    wanted = [name for row in entries(model, layout=form.layout).values() for name in row.files]
    for folder, prefix in ((tower, form.prefix), (language, _LANGUAGE)):
        _check_names(folder.path, prefix, found=origins.keys(), wanted=wanted, model=model)
    return Parts(
        path=language.path,
        model=model,
        layout=form.layout,
        tensors={
            name: folder.tensors[stored_name] for name, (folder, stored_name) in origins.items()
        },
        origins=origins,
    )


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
    raise CheckpointError(
        f"{path}, as a part of {model.name}: missing tensors: {listed(expected - own)}; tensors"
        f" that no row maps: {listed(own - expected)}.{hint}"
    )
