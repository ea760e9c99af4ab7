"""`vico convert`: between Megatron's form and Hugging Face's layouts; two parts to Megatron's.

Peak host memory is a few tensors, whatever the model's size. Under torchrun the processes share the
work.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from megatron_vico.cli.command_line import read
from megatron_vico.config.registry import MAX_TILES
from megatron_vico.config.schema import flag_of
from megatron_vico.convert.options import ConversionOptions, Layout
from megatron_vico.errors import CheckpointError, ConfigError
from megatron_vico.files import refuse_incomplete

if TYPE_CHECKING:
    from megatron_vico.convert.huggingface.config import ExportOptions

_ANY_LAYOUT_LOADS = ("pipeline_model_parallel_size", "expert_model_parallel_size")
_OF_FLASH = ("flash_relative_threshold", "flash_absolute_threshold", "flash_decision_rule")
_NO_PLACE = {
    "internvl": _OF_FLASH,
    "hf": (*_OF_FLASH, "use_thumbnail", "tile_tags"),
    "flash": (),
}
"""What the config of each layout cannot say."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an exported config says; unset, what the input's says."""

    flash_relative_threshold: float | None = None
    """Quantile of the flash rule."""

    flash_absolute_threshold: float | None = None
    """Least p of the flash rule."""

    flash_decision_rule: Literal["paper", "flash"] | None = None
    """paper: p > 0.5; flash: the released models' quantile and threshold."""

    max_dynamic_patch: int | None = None
    """Most tiles of one image, thumbnail not counted."""

    use_thumbnail: bool | None = None
    """Whether the whole image follows its tiles as one more."""

    tile_tags: Literal["none", "numbered"] | None = None
    """Text before each tile: none, or <tile_1>, ... (numbered)."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: if the model code could not use a number."""
        for name in ("flash_relative_threshold", "flash_absolute_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{flag_of(name)} {value}: expected 0 to 1.")
        if self.max_dynamic_patch is not None and not 1 <= self.max_dynamic_patch <= MAX_TILES:
            raise ConfigError(
                f"--max-dynamic-patch {self.max_dynamic_patch}: expected 1 to {MAX_TILES}."
            )


@dataclass(frozen=True, kw_only=True)
class Flags(ConversionOptions):
    """Convert between Megatron's form and Hugging Face's layouts; or two parts to Megatron's.

    Peak host memory is a few tensors, whatever the model's size. Under torchrun the processes share
    the work.
    """

    source: Annotated[Literal["hf", "megatron", "parts"], arg(name="from")]
    """Form of the input; parts: a vision tower and a language model apart, before a first
    pretraining."""

    target: Annotated[Literal["hf", "megatron"], arg(name="to")]
    """Form of the output."""

    input: Path | None = None
    """A Hugging Face folder, or a run's (its latest step)."""

    vit: Path | None = None
    """With --from parts: folder of an InternViT."""

    llm: Path | None = None
    """With --from parts: folder of a Qwen3 or Qwen3-MoE."""

    output: Path
    """Folder to make."""

    layout: Layout | None = None
    """Of the output; with --to megatron: refuse an input in any other (unset, it is found)."""

    pipeline_model_parallel_size: Annotated[int | None, arg(metavar="N")] = None
    """No effect: a Megatron checkpoint loads in every layout."""

    expert_model_parallel_size: Annotated[int | None, arg(metavar="N")] = None
    """No effect: a Megatron checkpoint loads in every layout."""

    exported: Exported

    @property
    def parts(self) -> tuple[Path, Path]:
        """Of a model that comes in two."""
        assert self.vit is not None
        assert self.llm is not None
        return self.vit, self.llm

    @property
    def said(self) -> dict[str, Any]:
        """What the exported config is to say."""
        return {name: value for name, value in vars(self.exported).items() if value is not None}

    def __post_init__(self) -> None:
        """Raises: ConfigError: if flags do not go together."""
        super().__post_init__()
        joins = self.source == "parts"
        named = {name for name in ("input", "vit", "llm") if getattr(self, name) is not None}
        if named != ({"vit", "llm"} if joins else {"input"}):
            needed = "--vit and --llm" if joins else "--input"
            raise ConfigError(f"--from {self.source} takes {needed}, and no other input.")
        if self.ckpt_step is not None and self.source != "megatron":
            raise ConfigError(
                f"--ckpt-step {self.ckpt_step} has no effect with --from {self.source}; leave it"
                " out."
            )
        if joins and (self.target != "megatron" or self.layout is not None):
            raise ConfigError(
                "--from parts makes a Megatron checkpoint to pretrain from: --to megatron, without"
                " --layout."
            )
        if self.source == self.target == "megatron":
            raise ConfigError(
                "--from megatron --to megatron converts nothing; a run of any layout loads the"
                " checkpoint."
            )
        if self.target == "hf":
            if self.layout is None:
                raise ConfigError("--to hf needs --layout: internvl, hf or flash.")
            for name in self.said.keys() & _NO_PLACE[self.layout]:
                raise ConfigError(
                    f"{flag_of(name)} has no effect on the {self.layout} layout, whose config has"
                    " no place for it; leave it out."
                )


def main(arguments: Sequence[str]) -> None:
    """Convert one folder; the input is never touched.

    Args:
        arguments: the words after `convert`.

    Raises:
        ConfigError: if flags do not go together.
        CheckpointError: if the input is broken, of another size, or lacks parts of the output's
            layout.
    """
    given = read(Flags, arguments, prog="vico convert")
    for folder in filter(None, (given.input, given.vit, given.llm)):
        refuse_incomplete(folder)
    from megatron_vico import cpu_stand_in

    cpu_stand_in.install()
    from megatron_vico.convert.combine import open_parts
    from megatron_vico.convert.convert import convert

    is_main = os.environ.get("RANK", "0") == "0"
    for name in _ANY_LAYOUT_LOADS:
        if getattr(given, name) is not None and is_main:
            print(
                f"note: {flag_of(name)} has no effect: runs of every layout load a Megatron"
                " checkpoint.",
                file=sys.stderr,
            )
    if given.input is not None:
        _check_form(given.input, given.source)
    to_hf = given.target == "hf"
    written = convert(
        given.input or open_parts(*given.parts, model_size=given.model_size),
        output=given.output,
        layout=given.layout if given.layout and to_hf else "megatron",
        export=_export_options(given),
        options=replace(given, input_layout=None if to_hf else given.layout, progress="bar"),
    )
    if is_main:
        for note in (*_notes(given, written), *_verified_notes(given)):
            print(f"note: {note}", file=sys.stderr)
        print(written)


def _notes(given: Flags, written: Path) -> Iterator[str]:
    from megatron_vico.files import read_json

    if given.target == "hf":
        said = read_json(written / "config.json")
        if not (written / "tokenizer_config.json").exists():
            yield (
                "no tokenizer came with the input, so none is beside the weights; convert with"
                " --tokenizer-model, or copy the files of one into the output."
            )
        if drawn := said.get("untrained_modules"):
            yield (
                f"{', '.join(drawn)}: never trained; flash_mode is false in config.json, so that"
                " servers compress nothing."
            )
        if said.get("tile_tags") or (given.layout == "hf" and said.get("use_thumbnail") is False):
            yield (
                "trained with tile tags or without thumbnails, which config.json says and `vico"
                " generate` follows; servers and transformers' own processor have no form of it."
            )
    if given.source == "parts" and given.tokenizer_model is None:
        yield (
            "the tokenizer beside the weights is the language model's own, without image tokens;"
            " train with InternVL3.5's (tools/build_tokenizer.py makes it), or convert with it as"
            " --tokenizer-model."
        )


def _verified_notes(given: Flags) -> list[str]:
    """What --verify has shown, and what it cannot."""
    from megatron_vico.checkpoint.integrity import CHECKSUMS
    from megatron_vico.checkpoint.run_folder import find_iteration

    if not given.verify:
        return []
    inputs = [given.input] if given.input is not None else list(given.parts)
    if given.source == "megatron":
        inputs = [find_iteration(inputs[0], given.ckpt_step)]
    unknown = [str(each) for each in inputs if not (each / CHECKSUMS).exists()]
    shown = "verified: the output holds what was read, bit for bit"
    if not unknown:
        return [f"{shown}, and the input is as its checksums say."]
    return [
        f"{shown}. Whether that is what was once written is not known: {' and '.join(unknown)} came"
        f" without {CHECKSUMS}; compare the files with their publisher's checksums."
    ]


def _check_form(folder: Path, form: str) -> None:
    from megatron_vico.convert.open import is_megatron

    if is_megatron(folder) != (form == "megatron"):
        run = folder.resolve().parent
        if folder.resolve().name.startswith("iter_") and is_megatron(run):
            raise CheckpointError(
                f"{folder} is one step of a run; name the run's folder, {run}, and --ckpt-step."
            )
        found = "megatron" if is_megatron(folder) else "hf"
        raise CheckpointError(
            f"{folder} is no {form} checkpoint; if it is one at all, --from {found}."
        )


def _export_options(given: Flags) -> "ExportOptions | None":
    """What the input says, changed by the command line; None where that says nothing."""
    from megatron_vico.convert.stated import stated_options

    if not given.said:
        return None
    assert given.input is not None
    said = stated_options(given.input, iteration=given.ckpt_step)
    return replace(said, **given.said)
