"""`vico evaluate`: score a model on a JSONL file of questions under one plan."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_vico.cli.command_line import read
from megatron_vico.cli.engine_flags import AnswerFlags
from megatron_vico.files import refuse_incomplete, refuse_unwritable


@dataclass(frozen=True, kw_only=True)
class Flags(AnswerFlags):
    """Score a model on a JSONL file of questions under one plan."""

    jsonl: Path
    """Official chat format, with `metrics` a question."""

    image_root: Path | None = None
    """Folder that image paths start from; unset, the JSONL's own."""

    allow_outside_root: bool = False
    """Read images also where paths or links lead out of --image-root."""

    limit: int | None = None
    """Use only so many conversations."""

    output: Path | None = None
    """JSON file for the figures."""

    write_plans: Path | None = None
    """JSONL file for what was decided for each image; `--plan replay` takes it."""

    _counts: ClassVar[tuple[str, ...]] = (*AnswerFlags._counts, "limit")

    def __post_init__(self) -> None:
        """Raises: ConfigError: if a count admits nothing, or a result could not be written."""
        super().__post_init__()
        refuse_unwritable("--output", self.output)
        refuse_unwritable("--write-plans", self.write_plans)


def main(arguments: Sequence[str]) -> None:
    """Print the figures, and write them where --output says.

    Raises:
        SampleError: if a line or image of the set cannot be used.
        CheckpointError: if --load is no checkpoint.
    """
    options = read(Flags, arguments, prog="vico evaluate")
    refuse_incomplete(options.load)
    from megatron_vico import cpu_stand_in

    cpu_stand_in.install()
    from megatron_vico.evaluation.runner import read_evaluation_set, run_evaluation
    from megatron_vico.files import write_json, write_text
    from megatron_vico.inference.plans import decisions

    samples = read_evaluation_set(
        options.jsonl,
        image_root=options.image_root or options.jsonl.parent,
        limit=options.limit,
        allow_outside_root=options.allow_outside_root,
    )
    plan = options.plan_source()
    with options.engine() as engine:
        prompts = [engine.prompt(sample.conversation) for sample in samples]
        evaluation = run_evaluation(
            engine,
            samples,
            row=options.chosen_plan,
            plan=plan,
            prompts=prompts,
            max_new_tokens=options.max_new_tokens,
        )
        if not engine.is_main:
            return
    result = evaluation.result
    if options.write_plans is not None:
        lines = [
            json.dumps({"id": prompt.key, "images": decisions(prompt, answer.compressed_N)})
            for prompt, answer in zip(prompts, evaluation.answers, strict=True)
        ]
        write_text(options.write_plans, "\n".join(lines) + "\n")
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
