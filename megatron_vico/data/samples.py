"""The types a sample passes through, from the shard to the packed batch.

ConversationSample (text and image files) -> EncodedSample (ids and tiles, one image token per tile)
-> PackedBatch (several samples, each text as one PackedStream per compression plan, torch tensors).
The tiles travel beside the PackedBatch (data/load/packed_bytes.py).

Shape letters: L tokens of a sample before expansion, T tokens of a pack after it, D samples
(documents) of a pack, N tiles, V visual tokens, R response rows, M tiles the router is asked about.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megatron_vico.errors import Cause

Role = Literal["system", "human", "gpt", "pretrain"]
ROLES: tuple[Role, ...] = get_args(Role)

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation; `text` may hold `<image>` tags."""

    role: Role
    """`pretrain` is plain text, trained whole (the official data format)."""

    text: str


@dataclass(frozen=True, kw_only=True)
class ConversationSample:
    """A conversation and the image files it speaks of, as read from a shard."""

    key: str
    """Unique name within its data set; every error about the sample carries it."""

    turns: tuple[Turn, ...]
    """At least one; answers are the `gpt` turns."""

    images: tuple[bytes, ...] = ()
    """Encoded files (JPEG, PNG), in the order of the `<image>` tags; of a video, its frames."""

    max_dynamic_patch: int | None = None
    """Most tiles of an image, where the sample's data set says so (1 for the frames of a video);
    None, the run's."""

    image_tag: str = "<image>"
    """What stands for an image in the turns; another where their texts may say `<image>`."""

    data_augment: bool = False
    """Whether its tiles go through JPEG compression of a random quality when it is trained."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedSample:
    """Token ids with ONE image token per tile, and the tiles; no compression plan yet."""

    key: str
    token_ids: IntArray
    """[L] int64."""

    is_response: BoolArray
    """[L] bool: the trained tokens (answers and their end mark); never the first token."""

    tiles: ByteArray
    """[N, 3, S, S] uint8 RGB, in the order of the image tokens; a thumbnail is its image's last."""

    tiles_per_image: tuple[int, ...] = ()
    """Sums to N."""

    @property
    def num_tiles(self) -> int:
        """N, the number of tiles."""
        return int(self.tiles.shape[0])

    @property
    def labels(self) -> IntArray:
        """[R] int64, the trained tokens in order; the same for every compression plan."""
        return self.token_ids[self.is_response]


@dataclass(frozen=True, kw_only=True, eq=False)
class Gap(EncodedSample):
    """What stands in a pack for a broken sample: one token that nothing is trained on."""

    missing_tiles: tuple[int, ...]
    """Tiles per image that the sample would have: plans are drawn for them too, so that its
    neighbours keep theirs."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A sample that could not be used; a gap stands in its pack (data/load/error_budget.py)."""

    sample_id: int
    """Index in the data set."""

    key: str
    cause: Cause
    reason: str = ""
    """The error's text; not kept in checkpoints."""

    from_pack: int | None = None
    """Pack of the run from which on no rank tries to read it; None, not agreed on yet."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedStream:
    """Samples one after the other under one plan, with each tile's visual tokens in place.

    Positions and rows count from the start of the pack.
    """

    compressed: Tensor
    """[N] bool, the plan: True where the tile gets the small number of visual tokens."""

    token_ids: Tensor
    """[T] int64."""

    cu_seqlens: Tensor
    """[D + 1] int32, where each sample starts; the last entry is T."""

    visual_positions: Tensor
    """[V] int64, where visual token v goes."""

    response_rows: Tensor
    """[R] int64, the position whose hidden state predicts response token r: the token's own
    position - 1."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedBatch:
    """One microbatch (a pack, or a part) without tiles: uncompressed reference, policy streams.

    Row r of the reference and of every policy view predicts the same response token, `labels[r]`.
    """

    keys: tuple[str, ...]
    """Names of the D samples, in pack order."""

    tiles_per_sample: tuple[int, ...]
    """[D] entries that sum to N."""

    tiles_per_image: tuple[int, ...]
    """Over all images of all samples; sums to N."""

    sample_of_row: Tensor
    """[R] int64, local index (0..D-1) of the sample that row r belongs to."""

    labels: Tensor
    """[R] int64, the response tokens."""

    kl_weight: Tensor
    """[R] float32, 1 / (response tokens of the row's sample * samples in the global batch)."""

    reference: PackedStream
    """Nothing compressed."""

    policies: tuple[PackedStream, ...]
    """pretrain: none; warmup and consistency: one, and for validation one more with everything
    compressed; router: nothing compressed, then the router's question."""

    position: int = 0
    """Index of the pack in its step, over all ranks."""

    first_sample: int = 0
    """Samples of the step before the first one here: their order over all ranks."""

    skipped: tuple[Skipped, ...] = ()
    """Broken samples among the D that were not known to be broken before this step."""

    router_tiles: Tensor
    """[M] int64, tiles compressed in the router's question."""

    router_tile_sample: Tensor
    """[M] int64, local index of the sample each router tile belongs to."""

    @property
    def num_tiles(self) -> int:
        """N."""
        return sum(self.tiles_per_sample)


def map_tensors[T](value: T, function: Callable[[Any], Any], *, leaf: type = Tensor) -> T:
    """`value` with `function` applied to every tensor (or other `leaf`) inside it."""
    mapped: Any = value
    if isinstance(value, leaf):
        mapped = function(value)
    elif isinstance(value, (tuple, list)):
        mapped = type(value)(map_tensors(item, function, leaf=leaf) for item in value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        fields = {name: map_tensors(getattr(value, name), function, leaf=leaf) for name in names}
        mapped = dataclasses.replace(value, **fields)
    return mapped
