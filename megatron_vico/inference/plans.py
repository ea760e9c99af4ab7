"""Where the compression plan of a conversation comes from, and the name that each source has.

Shapes: N tiles of a conversation.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron_vico.data.samples import EncodedSample
from megatron_vico.errors import ConfigError, SampleError, listed
from megatron_vico.files import read_json_lines
from megatron_vico.inference.pruning import PUBLISHED, Pruning
from megatron_vico.vico.compression_plan import generator, plan_all, plan_none, plan_random_exact
from megatron_vico.vico.routing import (
    FLASH_ABSOLUTE_THRESHOLD,
    FLASH_RELATIVE_THRESHOLD,
    compress_probability,
    flash_rule,
    paper_rule,
)

PLAN_NAMES = ("none", "all", "vir", "image", "random=R", "replay", "fastv", "sparsevlm")


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How ViR's scores become a plan."""

    rule: Literal["paper", "flash"] = "paper"
    """paper: p_compress > 0.5; flash: the released models' rule, over all tiles of one
    conversation."""

    granularity: Literal["tile", "image"] = "tile"
    """What the router was trained to decide on."""

    relative_threshold: float = FLASH_RELATIVE_THRESHOLD
    """Quantile of the flash rule."""

    absolute_threshold: float = FLASH_ABSOLUTE_THRESHOLD
    """Least probability of the flash rule."""

    def decide(self, logits_N2: Tensor) -> tuple[Tensor, Tensor]:
        """The plan, [N] bool, and p_compress, [N] float32, of one conversation."""
        if self.rule == "paper":
            compressed_N = paper_rule(logits_N2)
        else:
            compressed_N = flash_rule(
                logits_N2,
                relative_threshold=self.relative_threshold,
                absolute_threshold=self.absolute_threshold,
            )
        return compressed_N, compress_probability(logits_N2)


@dataclass(frozen=True, kw_only=True)
class Random:
    """A share of the tiles, drawn for the images: the same whenever they are asked about."""

    ratio: float
    """Share of tiles compressed, in [0, 1]; of each conversation rounded at random."""

    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Decisions that were written down before, by what the image is and how many tiles it has."""

    decisions: Mapping[tuple[str, int], str]
    """(sha256 of the image's file, tiles) -> one 0 or 1 a tile, 1 is compressed."""


PlanSource = Literal["none", "all"] | Routing | Random | Replay | Pruning | Tensor
"""Nothing or everything compressed, the router, random tiles, a file, no tile but tokens dropped
between layers, or a given plan [N] bool."""


@dataclass(frozen=True, kw_only=True)
class PromptImage:
    """An image of a prompt, as it was sent."""

    width: int
    height: int
    sha256: str
    num_tiles: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """A conversation ready to be answered."""

    parts: tuple[EncodedSample, ...]
    """What the model reads before each of its answers, with one image token a tile; all but the
    first begin behind an answer's `<|im_end|>`."""

    images: tuple[PromptImage, ...] = ()
    """Of all parts."""

    key: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.parts[0].key)

    @property
    def num_tiles(self) -> int:
        """N."""
        return sum(part.num_tiles for part in self.parts)

    @property
    def tiles_per_image(self) -> list[int]:
        """Sums to N."""
        return [count for part in self.parts for count in part.tiles_per_image]


def plan_of(source: PlanSource, prompt: Prompt) -> Tensor:
    """A conversation's plan, [N] bool, from any source but the router.

    Raises:
        SampleError: if a given plan has another number of tiles, or a file has none for an image.
    """
    assert not isinstance(source, Routing | Pruning)
    if isinstance(source, Tensor):
        if source.shape != (prompt.num_tiles,):
            raise SampleError(
                f"sample {prompt.key!r}: a plan for {len(source)} tiles but {prompt.num_tiles}"
                " tiles; give one bool a tile."
            )
        return source
    if isinstance(source, Replay):
        return _replayed(source, prompt)
    if isinstance(source, Random):
        names = "/".join(image.sha256 for image in prompt.images)
        draw = generator(source.seed, 0, 0, f"random/{hashlib.sha256(names.encode()).hexdigest()}")
        wanted = source.ratio * prompt.num_tiles
        # Rounded up as often as the fraction says, so that the share is exact in expectation.
        chosen = min(int(wanted + float(torch.rand((), generator=draw))), prompt.num_tiles)
        return plan_random_exact(prompt.num_tiles, chosen, generator=draw)
    return (plan_all if source == "all" else plan_none)(prompt.num_tiles)


def read_plan(
    name: str,
    *,
    routing: Routing | None,
    replay: Replay | None = None,
    num_layers: int = 0,
) -> PlanSource:
    """The source that a name stands for, such as "vir" or "random=0.55".

    Args:
        name: of PLAN_NAMES; fastv and sparsevlm also with the share of visual tokens saved, mean
            over layers: fastv=0.41.
        routing: the checkpoint's; None, it has no trained router.
        replay: what "replay" takes; None, there is no file.
        num_layers: of the language model, for fastv and sparsevlm.

    Raises:
        ConfigError: if there is no such plan, or the checkpoint or the command line lacks something
            for it.
    """
    kind, equals, number = name.partition("=")
    if kind in ("vir", "image") and not equals:
        if routing is None:
            raise ConfigError(f"plan {name!r}: no trained router; expected none, all or random=R.")
        return replace(routing, granularity="image") if kind == "image" else routing
    if kind == "replay" and not equals:
        if replay is None:
            raise ConfigError("plan 'replay': no decisions; give a file of them by --replay.")
        return replay
    rule = next((each for each in PUBLISHED if each == kind), None)
    if kind == "random" or (rule and equals):
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        if not 0.0 <= share <= 1.0:
            what = "tiles" if kind == "random" else "visual tokens saved"
            raise ConfigError(
                f"plan {name!r}: expected a share of {what} in [0, 1], as {kind}=0.4."
            )
        if rule is None:
            return Random(ratio=share)
        return Pruning(rule=rule, num_layers=num_layers, saved=share)
    if rule:
        return Pruning(rule=rule, num_layers=num_layers)
    if name == "none":
        return "none"
    if name == "all":
        return "all"
    raise ConfigError(f"unknown plan {name!r}; expected one of {listed(PLAN_NAMES)}.")


def decisions(prompt: Prompt, compressed_N: Tensor) -> list[dict[str, object]]:
    """What was decided for each image, as request logs and `--write-plans` have it."""
    found = list[dict[str, object]]()
    plans = compressed_N.tolist()
    for image in prompt.images:
        own, plans = plans[: image.num_tiles], plans[image.num_tiles :]
        found.append(
            {
                "width": image.width,
                "height": image.height,
                "sha256": image.sha256,
                "tiles": image.num_tiles,
                "compressed_tiles": sum(own),
                "plan": "".join(str(int(each)) for each in own),
            }
        )
    return found


def read_replay(path: Path) -> Replay:
    """Decisions of a JSONL file whose lines have `images`, as `decisions` gives them.

    Raises:
        ConfigError: if it is not there, or has none.
    """
    if not path.is_file():
        raise ConfigError(f"--replay {path}: no such file; give a request log or --write-plans'.")
    lines, _ = read_json_lines(path)
    found = dict[tuple[str, int], str]()
    for line in lines:
        images = line.get("images")
        for image in images if isinstance(images, Sequence) else ():
            plan = image.get("plan")
            if isinstance(plan, str) and not set(plan) - {"0", "1"}:
                found[str(image.get("sha256")), len(plan)] = plan
    if not found:
        raise ConfigError(
            f"--replay {path}: no decision in {len(lines)} lines; expected objects with `images`,"
            " each with `sha256` and `plan`, such as `vico serve --request-log` writes."
        )
    return Replay(decisions=found)


def _replayed(source: Replay, prompt: Prompt) -> Tensor:
    bits = ""
    for number, image in enumerate(prompt.images, start=1):
        plan = source.decisions.get((image.sha256, image.num_tiles))
        if plan is None:
            raise SampleError(
                f"sample {prompt.key!r}: image {number} ({image.num_tiles} tiles,"
                f" {image.sha256[:12]}) is not among {len(source.decisions)} decisions; write them"
                " for the same images and tile limit."
            )
        bits += plan
    return torch.tensor([bit == "1" for bit in bits], dtype=torch.bool)
