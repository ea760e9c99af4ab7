"""`vico generate`: ask a model about images or a video, and see how many tiles it compressed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import UseAppendAction, create_mutex_group

from megatron_vico.cli.command_line import read, refuse_less
from megatron_vico.cli.engine_flags import AnswerFlags
from megatron_vico.errors import ConfigError, SampleError
from megatron_vico.files import read_plain, refuse_incomplete

if TYPE_CHECKING:
    from megatron_vico.data.samples import ConversationSample

_SEEN = create_mutex_group(required=False)


@dataclass(frozen=True, kw_only=True)
class Flags(AnswerFlags):
    """Ask a model about images or a video, and see how many tiles it compressed."""

    image: Annotated[tuple[Path, ...], _SEEN] = ()
    """Image files, in the order of their <image>."""

    video: Annotated[Path | None, _SEEN] = None
    """A video file, shown as frames of one tile each."""

    num_frames: int | None = None
    """Frames of the video; unset, 8."""

    prompt: UseAppendAction[tuple[str, ...]]
    """A question; may be repeated, each sees the answers before it. `<image>` says where an image
    goes, in any of them; without it, all come first."""

    system: str | None = None
    """System message; unset, the official one, or with --thinking its own."""

    thinking: bool = False
    """Ask for reasoning between <think> and </think>, by the official system message for it."""

    temperature: float = 0.0
    """0 is greedy; the official value for thinking is 0.6."""

    top_p: float = 1.0
    """Least sum of the probabilities that are drawn from."""

    seed: int = 0
    """Of what is drawn."""

    stop: UseAppendAction[tuple[str, ...]] = ()
    """A text that ends an answer; may be repeated."""

    _counts: ClassVar[tuple[str, ...]] = (*AnswerFlags._counts, "num_frames")

    def __post_init__(self) -> None:
        """Raises: ConfigError: if flags do not go together, or a number admits nothing."""
        super().__post_init__()
        refuse_less(self, temperature=0)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}: expected a share above 0, at most 1.")
        if not self.prompt:
            raise ConfigError("--prompt is not given; ask something.")
        if "" in self.stop:
            raise ConfigError("--stop '': every answer would end before it begins; leave it out.")
        if self.num_frames is not None and self.video is None:
            raise ConfigError(f"--num-frames {self.num_frames} has no effect without --video.")


def main(arguments: Sequence[str]) -> None:
    """Answer one conversation and print it.

    Raises:
        ConfigError: if flags do not go together.
        SampleError: if an image or the video cannot be used.
        CheckpointError: if --load is no checkpoint.
    """
    options = read(Flags, arguments, prog="vico generate")
    refuse_incomplete(options.load)
    from megatron_vico import cpu_stand_in

    cpu_stand_in.install()
    from megatron_vico.inference.sampling import Sampling

    sample = _sample(options)
    with options.engine() as engine:
        prompts, plan = [engine.prompt(sample)], options.plan_source()
        sampling = Sampling(
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            stop=options.stop,
        )
        (answers,) = engine.answer(
            prompts, plan=plan, max_new_tokens=options.max_new_tokens, sampling=sampling
        )
        if not engine.is_main:
            return
    for question, text in zip(options.prompt, answers.texts, strict=True):
        print(f"> {question}\n{text}\n")
    num_tiles = len(answers.compressed_N)
    print(
        f"{int(answers.compressed_N.sum())} of {num_tiles} tiles compressed,"
        f" {answers.num_visual_tokens} visual tokens"
    )


def _sample(options: Flags) -> "ConversationSample":
    from megatron_vico.data.encode.conversation import THINKING_SYSTEM_MESSAGE
    from megatron_vico.data.encode.video import INFERENCE_TEXT, middle_frames, with_frames
    from megatron_vico.data.samples import ConversationSample, Turn

    turns = tuple(Turn("human", text) for text in options.prompt)
    system = options.system or (THINKING_SYSTEM_MESSAGE if options.thinking else None)
    if system is not None:
        turns = (Turn("system", system), *turns)
    if options.video is None:
        images = tuple(_read(path) for path in options.image)
        return ConversationSample(key="prompt", turns=turns, images=images)
    frames = middle_frames(options.video, num_frames=options.num_frames or 8)
    turns = with_frames(turns, len(frames), frame_text=INFERENCE_TEXT, key="prompt")
    return ConversationSample(key="prompt", turns=turns, images=tuple(frames), max_dynamic_patch=1)


def _read(path: Path) -> bytes:
    try:
        return read_plain(path)
    except OSError as error:
        message = f"{path}: {error.strerror}; give an image file that can be read."
        raise SampleError(message) from error
