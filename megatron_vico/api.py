"""The package from Python: a model to route and to ask, and the paper's functions by name.

    import megatron_vico

    with megatron_vico.load_model("models/8b-flash") as model:
        print(model.ask("What is the total?", ["page.png"]).texts)

Its names are those of `megatron_vico` itself, which imports them when they are used.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from megatron_vico import cpu_stand_in
from megatron_vico.cli.engine_flags import AnswerFlags
from megatron_vico.data.samples import ConversationSample, Turn

if TYPE_CHECKING:
    from megatron_vico.inference.engine import Answers, Engine, Prompt

Picture = str | Path | bytes | Image.Image
"""A file, its bytes, or an image."""


class Model:
    """A model on this machine's device; see `load_model`."""

    def __init__(self, engine: "Engine", flags: AnswerFlags) -> None:
        self.engine = engine
        self._flags = flags

    def ask(
        self,
        questions: str | Sequence[str],
        images: Sequence[Picture] = (),
        *,
        system: str | None = None,
        plan: str | None = None,
        max_new_tokens: int = 64,
    ) -> "Answers":
        """Answer greedily.

        Args:
            questions: one, or several of a conversation, each of which sees the answers before it.
                `<image>` says where an image goes; without any, they come first.
            images: in the order of their `<image>`.
            system: the system message; None, that of the template.
            plan: none, all, vir, image, random=R, fastv or sparsevlm, as for `vico generate`; None:
                the router's where the checkpoint has a trained one, else none.
            max_new_tokens: longest answer.

        Raises:
            SampleError: if an image cannot be used, or the conversation is too long.
            ConfigError: if the plan needs what was never trained.
        """
        asked = [questions] if isinstance(questions, str) else questions
        turns = [] if system is None else [Turn("system", system)]
        prompt = self._prompt([*turns, *(Turn("human", text) for text in asked)], images)
        source = self._flags.plan_source() if plan is None else self._flags.read_plan(plan)
        (answers,) = self.engine.answer([prompt], plan=source, max_new_tokens=max_new_tokens)
        return answers

    def route(self, images: Sequence[Picture]) -> tuple[Tensor, Tensor]:
        """Ask the router alone.

        Returns:
            For each tile of all images whether it is compressed, [N] bool, and p^0 of Eq. 4, [N].

        Raises:
            SampleError: if an image cannot be used.
            ConfigError: if there is no trained router.
        """
        (routed,) = self.engine.route(
            [self._prompt([Turn("human", "?")], images)], self._flags.routing()
        )
        return routed

    def _prompt(self, turns: Sequence[Turn], images: Sequence[Picture]) -> "Prompt":
        content = tuple(map(_content, images))
        return self.engine.prompt(
            ConversationSample(key="prompt", turns=tuple(turns), images=content)
        )


@contextmanager
def load_model(folder: str | Path, **flags: Any) -> Iterator[Model]:
    """A model of a run's folder, or of a Hugging Face folder in any layout, for as long as needed.

    Args:
        folder: what `vico generate --load` takes; it says how images are cut into tiles.
        flags: of `vico generate`, such as bf16=True, tokenizer_model=..., max_dynamic_patch=6.

    Raises:
        CheckpointError: if it is no checkpoint, or broken.
        ConfigError: if there is no tokenizer, or a flag is out of range.
    """
    cpu_stand_in.install()
    options = AnswerFlags(load=Path(folder), **flags)
    with options.engine() as engine:
        yield Model(engine, options)


def _content(image: Picture) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        image.save(file, "png")
        return file.getvalue()
    return Path(image).read_bytes()
