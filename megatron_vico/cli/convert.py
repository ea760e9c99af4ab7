"""`vico convert`: between Megatron's form and Hugging Face's layouts; two parts to Megatron's.

Peak host memory is a few tensors, whatever the model's size. Under torchrun the processes share the
work.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vico.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from megatron_vico.convert.huggingface.config import ExportOptions

# Those of the table and of ConversionOptions, here without torch; a test compares them.
LAYOUTS = ("internvl", "hf", "flash")
DTYPES = ("fp32", "bf16")
_ANY_LAYOUT_LOADS = ("pipeline_model_parallel_size", "expert_model_parallel_size")
_EXPORTED = (
    *("flash_relative_threshold", "flash_absolute_threshold", "flash_decision_rule"),
    *("max_dynamic_patch", "use_thumbnail"),
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
    given = _parser().parse_args(arguments)
    from megatron_vico.convert.combine import open_parts
    from megatron_vico.convert.convert import ConversionOptions, convert

    _check(given)
    if given.source != "parts":
        _check_form(given.input, given.source)
    is_main = os.environ.get("RANK", "0") == "0"
    for name in _ANY_LAYOUT_LOADS:
        if getattr(given, name) is not None and is_main:
            flag = f"--{name.replace('_', '-')}"
            print(
                f"note: {flag} has no effect: runs of every layout load a Megatron checkpoint.",
                file=sys.stderr,
            )
    sizes = {
        name: getattr(given, name)
        for name in ("seed", "max_shard_bytes")
        if getattr(given, name) is not None
    }
    written = convert(
        open_parts(given.vit, given.llm, model_size=given.model_size)
        if given.source == "parts"
        else given.input,
        output=given.output,
        layout="megatron" if given.target == "megatron" else given.layout,
        options=ConversionOptions(
            input_layout=given.layout if given.target == "megatron" else None,
            model_size=given.model_size if given.source != "parts" else None,
            iteration=given.ckpt_step,
            dtype=given.dtype,
            tokenizer_model=given.tokenizer_model,
            export=_export_options(given),
            tensor_parallel_size=given.tensor_model_parallel_size or 1,
            verify="bits" if given.verify else "no",
            progress="bar",
            **sizes,
        ),
    )
    if is_main:
        for note in _tokenizer_notes(given, written):
            print(f"note: {note}", file=sys.stderr)
        print(written)


def _tokenizer_notes(given: argparse.Namespace, written: Path) -> list[str]:
    if given.target == "hf" and not (written / "tokenizer_config.json").exists():
        return [
            "no tokenizer came with the input, so none is beside the weights; convert with"
            " --tokenizer-model, or copy the files of one into the output."
        ]
    if given.source == "parts" and given.tokenizer_model is None:
        return [
            "the tokenizer beside the weights is the language model's own, without image tokens;"
            " train with InternVL3.5's (tools/build_tokenizer.py makes it), or convert with it as"
            " --tokenizer-model."
        ]
    return []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vico convert", description=__doc__)
    forms = ("hf", "megatron")
    from_help = (
        "form of the input; parts: a vision tower and a language model apart, before a first"
        " pretraining"
    )
    parser.add_argument(
        "--from", dest="source", choices=(*forms, "parts"), required=True, help=from_help
    )
    parser.add_argument(
        "--to", dest="target", choices=forms, required=True, help="form of the output"
    )
    parser.add_argument(
        "--input", type=Path, help="a Hugging Face folder, or a run's (its latest step)"
    )
    parser.add_argument("--vit", type=Path, help="with --from parts: folder of an InternViT")
    parser.add_argument(
        "--llm", type=Path, help="with --from parts: folder of a Qwen3 or Qwen3-MoE"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    layout_help = (
        "of the output; with --to megatron: refuse an input in any other (unset, it is found)"
    )
    parser.add_argument("--layout", choices=LAYOUTS, help=layout_help)
    parser.add_argument(
        "--model-size",
        help="refuse any other than this preset or config.json; unset, what the input says it is",
    )
    parser.add_argument(
        "--ckpt-step",
        type=int,
        help="with --from megatron: the run's step to take; unset, the latest",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights; unset, each tensor keeps its own",
    )
    parser.add_argument(
        "--tokenizer-model", type=Path, help="to put beside the weights; unset, the input's"
    )
    seed_help = "of connectors and ViR where the input of --to megatron has none"
    parser.add_argument("--seed", type=int, help=seed_help)
    shard_help = (
        "size above which a new file begins; processes share a Hugging Face output file by file"
    )
    parser.add_argument("--max-shard-bytes", type=int, help=shard_help)
    parser.add_argument(
        "--verify", action="store_true", help="read the output back and compare every bit of it"
    )
    _add_parallel_sizes(parser)
    _add_exported(parser)
    return parser


def _add_parallel_sizes(parser: argparse.ArgumentParser) -> None:
    padding_help = (
        "with --to megatron: pad the vocabulary as for this size; runs of other sizes load it all"
        " the same"
    )
    parser.add_argument("--tensor-model-parallel-size", type=int, metavar="N", help=padding_help)
    for name in _ANY_LAYOUT_LOADS:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(
            flag,
            type=int,
            metavar="N",
            help="no effect: a Megatron checkpoint loads in every layout",
        )


def _add_exported(parser: argparse.ArgumentParser) -> None:
    exported = parser.add_argument_group(
        "what an exported config says; unset, what the input's says"
    )
    exported.add_argument("--flash-relative-threshold", type=float)
    exported.add_argument("--flash-absolute-threshold", type=float)
    exported.add_argument("--flash-decision-rule", choices=("paper", "flash"))
    exported.add_argument("--max-dynamic-patch", type=int)
    exported.add_argument("--use-thumbnail", action=argparse.BooleanOptionalAction)


def _check_form(folder: Path, form: str) -> None:
    from megatron_vico.convert.open import is_megatron
    from megatron_vico.files import refuse_incomplete

    refuse_incomplete(folder)
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


def _check_exported(given: argparse.Namespace) -> None:
    """Refuse what an exported config has no place for, and what the model code could not use."""
    no_place = {
        "internvl": ("flash_relative_threshold", "flash_absolute_threshold", "flash_decision_rule"),
        "hf": (
            "flash_relative_threshold",
            "flash_absolute_threshold",
            "flash_decision_rule",
            "use_thumbnail",
        ),
    }
    for name in no_place.get(given.layout, ()) if given.target == "hf" else ():
        if getattr(given, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} has no effect on the {given.layout} layout, whose"
                " config has no place for it; leave it out."
            )
    for name in ("flash_relative_threshold", "flash_absolute_threshold"):
        value = getattr(given, name)
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected 0 to 1.")
    if given.max_dynamic_patch is not None and given.max_dynamic_patch < 1:
        raise ConfigError(f"--max-dynamic-patch {given.max_dynamic_patch}: expected 1 or more.")


def _check(given: argparse.Namespace) -> None:
    joins = given.source == "parts"
    named = {name for name in ("input", "vit", "llm") if getattr(given, name) is not None}
    if named != ({"vit", "llm"} if joins else {"input"}):
        needed = "--vit and --llm" if joins else "--input"
        raise ConfigError(f"--from {given.source} takes {needed}, and no other input.")
    if given.ckpt_step is not None and given.source != "megatron":
        raise ConfigError(
            f"--ckpt-step {given.ckpt_step} has no effect with --from {given.source}; leave it out."
        )
    if joins and (given.target != "megatron" or given.layout is not None):
        raise ConfigError(
            "--from parts makes a Megatron checkpoint to pretrain from: --to megatron, without"
            " --layout."
        )
    if given.target == "hf" and given.layout is None:
        raise ConfigError("--to hf needs --layout: internvl, hf or flash.")
    if given.source == given.target == "megatron":
        raise ConfigError(
            "--from megatron --to megatron converts nothing; a run of any layout loads the"
            " checkpoint."
        )
    if given.tensor_model_parallel_size is not None and given.tensor_model_parallel_size < 1:
        raise ConfigError(
            f"--tensor-model-parallel-size {given.tensor_model_parallel_size}: expected 1 or more."
        )
    if given.max_shard_bytes is not None and given.max_shard_bytes < 1:
        raise ConfigError(
            f"--max-shard-bytes {given.max_shard_bytes}: expected 1 or more; 5000000000 is usual."
        )
    _check_exported(given)


def _export_options(given: argparse.Namespace) -> "ExportOptions | None":
    """What the input's config says, changed by the command line; None where that says nothing."""
    from megatron_vico.convert.huggingface.config import ExportOptions, options_of
    from megatron_vico.convert.huggingface.export import carried_config
    from megatron_vico.convert.open import TOKENIZER_FOLDER

    said = {name: getattr(given, name) for name in _EXPORTED if getattr(given, name) is not None}
    if not said:
        return None
    config = carried_config(
        given.input / TOKENIZER_FOLDER if given.source == "megatron" else given.input
    )
    options = options_of(config) if config else ExportOptions()
    if given.tokenizer_model is not None:
        options = replace(options, eos_token_id=None, pad_token_id=None)  # the tokenizer's count
    return replace(options, **said)
