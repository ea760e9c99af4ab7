"""`vico evaluate`: score a model on a JSONL file of questions under one plan."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from megatron_vico.cli.engine_flags import add_engine_flags, open_engine, plan_source


def main(arguments: Sequence[str]) -> None:
    """Print the figures, and write them where --output says.

    Raises:
        SampleError: if a line or image of the set cannot be used.
        CheckpointError: if --load is no checkpoint.
    """
    parser = argparse.ArgumentParser(prog="vico evaluate", description=__doc__)
    jsonl_help = "official chat format, with `metrics` a question"
    parser.add_argument("--jsonl", type=Path, required=True, help=jsonl_help)
    root_help = "folder that image paths start from; unset, the JSONL's own"
    parser.add_argument("--image-root", type=Path, help=root_help)
    parser.add_argument("--limit", type=int, help="use only so many conversations")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    add_engine_flags(parser)
    options = parser.parse_args(arguments)
    from megatron_vico.evaluation.runner import read_evaluation_set, run_evaluation
    from megatron_vico.files import write_json

    samples = read_evaluation_set(
        options.jsonl, image_root=options.image_root or options.jsonl.parent, limit=options.limit
    )
    with open_engine(options) as engine:
        result = run_evaluation(
            engine,
            samples,
            row=options.plan,
            plan=plan_source(options),
            max_new_tokens=options.max_new_tokens,
        ).result
    print(f"{len(samples)} conversations: score {result.score:.2%} +- {result.standard_error:.2%}")
    for kind, score in result.score_by_kind.items():
        print(f"  {kind}: {score:.2%} of {result.num_questions_by_kind[kind]} questions")
    print(
        f"{result.compressed_tiles:.1%} of tiles compressed, {result.visual_token_reduction:.1%}"
        " fewer visual tokens"
    )
    if options.output is not None:
        shares = {
            "compressed_tiles": result.compressed_tiles,
            "visual_token_reduction": result.visual_token_reduction,
        }
        write_json(options.output, dataclasses.asdict(result) | shares, sort_keys=False)
