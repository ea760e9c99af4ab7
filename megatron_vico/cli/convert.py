"""`vico convert`: a checkpoint between Megatron's form and Hugging Face's layouts (internvl, hf, flash)."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args


def main(arguments: Sequence[str]) -> None:
    """Convert one folder; the input is never touched.

    Args:
        arguments: the words after `convert`.

    Raises:
        CheckpointError: if the input is broken, of another size, or lacks parts of the output's layout.
    """
    from megatron_vico.checkpoint.convert import DTypeName, convert
    from megatron_vico.checkpoint.hf_config import ExportOptions
    from megatron_vico.checkpoint.internvl_mapping import Layout

    defaults = ExportOptions()
    parser = argparse.ArgumentParser(prog="vico convert", description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="a run's folder, or a Hugging Face folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--layout", choices=("megatron", *get_args(Layout)), required=True, help="of the output")
    parser.add_argument("--model-size", help="refuse any other; unset, the one the input says it is")
    parser.add_argument("--dtype", choices=get_args(DTypeName), help="of the weights; unset, the input's")
    parser.add_argument("--tokenizer-model", type=Path, help="to put beside exported weights; unset, the input's")
    parser.add_argument("--seed", type=int, default=1234, help="of connector_16x and ViR where the input has none")
    exported = parser.add_argument_group("what an exported config says")
    exported.add_argument("--flash-relative-threshold", type=float, default=defaults.flash_relative_threshold)
    exported.add_argument("--flash-absolute-threshold", type=float, default=defaults.flash_absolute_threshold)
    exported.add_argument("--flash-decision-rule", choices=("paper", "flash"), default=defaults.flash_decision_rule)
    exported.add_argument("--max-dynamic-patch", type=int, default=defaults.max_dynamic_patch)
    exported.add_argument("--use-thumbnail", action=argparse.BooleanOptionalAction, default=defaults.use_thumbnail)
    options = parser.parse_args(arguments)
    written = convert(
        options.input,
        output=options.output,
        layout=options.layout,
        model_size=options.model_size,
        dtype=options.dtype,
        tokenizer_model=options.tokenizer_model,
        options=ExportOptions(
            flash_relative_threshold=options.flash_relative_threshold,
            flash_absolute_threshold=options.flash_absolute_threshold,
            flash_decision_rule=options.flash_decision_rule,
            max_dynamic_patch=options.max_dynamic_patch,
            use_thumbnail=options.use_thumbnail,
        ),
        seed=options.seed,
    )
    print(written)
