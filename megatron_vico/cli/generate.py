"""`vico generate`: ask a model about images or a video, and see how many tiles it compressed."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vico.cli.engine_flags import add_engine_flags, open_engine, plan_source
from megatron_vico.errors import SampleError

if TYPE_CHECKING:
    from megatron_vico.data.samples import ConversationSample


def main(arguments: Sequence[str]) -> None:
    """Answer one conversation and print it.

    Raises:
        SampleError: if an image or the video cannot be used.
        CheckpointError: if --load is no checkpoint.
    """
    parser = argparse.ArgumentParser(prog="vico generate", description=__doc__)
    seen = parser.add_mutually_exclusive_group()
    image_help = "image files, in the order of their <image>"
    seen.add_argument("--image", type=Path, nargs="+", default=[], help=image_help)
    seen.add_argument("--video", type=Path, help="a video file, shown as frames of one tile each")
    parser.add_argument("--num-frames", type=int, help="frames of the video; default: 8")
    prompt_help = "a question; may be repeated, each sees the answers before it"
    parser.add_argument("--prompt", action="append", required=True, help=prompt_help)
    add_engine_flags(parser)
    options = parser.parse_args(arguments)
    if options.num_frames is not None and (options.video is None or options.num_frames < 1):
        parser.error(f"--num-frames {options.num_frames}: expected 1 or more, and a --video")
    sample = _sample(options)
    with open_engine(options) as engine:
        prompts, plan = [engine.prompt(sample)], plan_source(options)
        (answers,) = engine.answer(prompts, plan=plan, max_new_tokens=options.max_new_tokens)
    for question, text in zip(options.prompt, answers.texts, strict=True):
        print(f"> {question}\n{text}\n")
    num_tiles = len(answers.compressed_N)
    print(
        f"{int(answers.compressed_N.sum())} of {num_tiles} tiles compressed,"
        f" {answers.num_visual_tokens} visual tokens"
    )


def _sample(options: argparse.Namespace) -> "ConversationSample":
    from megatron_vico.data.encode.video import INFERENCE_TEXT, middle_frames, with_frames
    from megatron_vico.data.samples import ConversationSample, Turn

    turns = tuple(Turn("human", text) for text in options.prompt)
    if options.video is None:
        images = tuple(_read(path) for path in options.image)
        return ConversationSample(key="prompt", turns=turns, images=images)
    frames = middle_frames(options.video, num_frames=options.num_frames or 8)
    turns = with_frames(turns, len(frames), frame_text=INFERENCE_TEXT, key="prompt")
    return ConversationSample(key="prompt", turns=turns, images=tuple(frames), max_dynamic_patch=1)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"{path}: {error.strerror}; give an image file that can be read."
        raise SampleError(message) from error
