"""`vico generate`: ask a model about images, and see how many of their tiles it compressed."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_vico.cli.engine_flags import add_engine_flags, open_engine, plan_source
from megatron_vico.errors import SampleError


def main(arguments: Sequence[str]) -> None:
    """Answer one conversation and print it.

    Args:
        arguments: the words after `generate`.

    Raises:
        SampleError: if an image cannot be used.
        CheckpointError: if --load is no checkpoint.
    """
    parser = argparse.ArgumentParser(prog="vico generate", description=__doc__)
    parser.add_argument("--image", type=Path, nargs="+", default=[], help="image files, in the order of their <image>")
    parser.add_argument(
        "--prompt", action="append", required=True, help="a question; may be repeated, each sees the answers before it"
    )
    add_engine_flags(parser)
    options = parser.parse_args(arguments)
    from megatron_vico.data.samples import ConversationSample, Turn

    turns = tuple(Turn("human", text) for text in options.prompt)
    sample = ConversationSample(key="prompt", turns=turns, images=tuple(_read(path) for path in options.image))
    with open_engine(options) as engine:
        (answers,) = engine.answer(
            [engine.prompt(sample)], plan=plan_source(options), max_new_tokens=options.max_new_tokens
        )
    for question, text in zip(options.prompt, answers.texts, strict=True):
        print(f"> {question}\n{text}\n")
    num_tiles = len(answers.compressed_N)
    print(
        f"{int(answers.compressed_N.sum())} of {num_tiles} tiles compressed, {answers.num_visual_tokens} visual tokens"
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SampleError(f"{path}: {error.strerror}; give an image file that can be read.") from error
