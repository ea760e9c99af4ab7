"""The one place where a compression plan meets the text: each tile's single image token becomes its
visual tokens.

Everything that depends on positions (where visual tokens go, which hidden states predict responses)
is computed here, once, so that the reference and the policy stream cannot drift apart.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_vico.data.samples import BoolArray, EncodedSample, IntArray, PackedStream, Stream
from megatron_vico.errors import SampleError


def expand(
    sample: EncodedSample,
    *,
    plan: npt.ArrayLike | Tensor,
    tokens_kept: int,
    tokens_compressed: int,
    image_token_id: int,
) -> Stream:
    """The stream of one sample under one compression plan.

    Args:
        sample: ids with one image token per tile.
        plan: [N] bool, True where the tile gets `tokens_compressed` visual tokens.
        tokens_kept: visual tokens of a tile that is not compressed (256).
        tokens_compressed: visual tokens of a compressed tile (64).
        image_token_id: id of `<IMG_CONTEXT>`.

    Returns:
        Ids, the positions of visual tokens, and the rows that predict responses.

    Raises:
        SampleError: if the number of image tokens, tiles or plan entries differ, or the first token
            is a response.
    """
    check_image_tokens(sample, image_token_id=image_token_id)
    plan_N = _as_bool(plan)
    if plan_N.shape != (sample.num_tiles,):
        raise SampleError(
            f"sample {sample.key!r}: a plan for {plan_N.size} tiles but {sample.num_tiles} tiles."
        )
    tokens_per_tile = np.where(plan_N, tokens_compressed, tokens_kept)
    stream, _ = _expand(sample.token_ids, sample.is_response, tokens_per_tile, image_token_id)
    return stream


def expand_pack(
    samples: Sequence[EncodedSample],
    *,
    plan: npt.ArrayLike | Tensor,
    tokens_kept: int,
    tokens_compressed: int,
    image_token_id: int,
) -> PackedStream:
    """The streams of several samples, joined; equal to `expand` of each one, with positions
    shifted.

    Args:
        samples: at least one, checked by `check_image_tokens`.
        plan: [N] bool over all tiles of all samples.
        tokens_kept: visual tokens of a tile that is not compressed.
        tokens_compressed: visual tokens of a compressed tile.
        image_token_id: id of `<IMG_CONTEXT>`.

    Returns:
        The packed stream, as torch tensors.
    """
    tokens_per_tile = np.where(_as_bool(plan), tokens_compressed, tokens_kept)
    token_ids = np.concatenate([sample.token_ids for sample in samples])
    is_response = np.concatenate([sample.is_response for sample in samples])
    stream, starts = _expand(token_ids, is_response, tokens_per_tile, image_token_id)
    ends = np.cumsum([sample.token_ids.size for sample in samples])
    cu_seqlens = np.zeros(len(samples) + 1, dtype=np.int32)
    cu_seqlens[1:] = np.append(starts, stream.token_ids.size)[ends]
    return PackedStream(
        token_ids=torch.from_numpy(stream.token_ids),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(np.diff(cu_seqlens).max()),
        visual_positions=torch.from_numpy(stream.visual_positions),
        response_rows=torch.from_numpy(stream.response_rows),
    )


def check_image_tokens(sample: EncodedSample, *, image_token_id: int) -> None:
    """Check that a sample has one image token per tile and that something predicts each response
    token.

    Raises:
        SampleError: if not.
    """
    num_placeholders = int(np.count_nonzero(sample.token_ids == image_token_id))
    if num_placeholders != sample.num_tiles or sum(sample.tiles_per_image) != sample.num_tiles:
        raise SampleError(
            f"sample {sample.key!r}: {num_placeholders} image placeholders but {sample.num_tiles}"
            f" tiles ({sum(sample.tiles_per_image)} over its images); check the <image> tags of the"
            " conversation."
        )
    if sample.is_response[:1].any():
        raise SampleError(
            f"sample {sample.key!r}: the first token is a response; nothing predicts it."
        )


def _expand(
    token_ids: IntArray, is_response: BoolArray, tokens_per_tile: IntArray, image_token_id: int
) -> tuple[Stream, IntArray]:
    """The stream, and where each input token starts in it."""
    repeats = np.ones(token_ids.size, dtype=np.int64)
    repeats[token_ids == image_token_id] = tokens_per_tile
    starts = np.cumsum(repeats) - repeats
    expanded = np.repeat(token_ids, repeats)
    stream = Stream(
        token_ids=expanded,
        visual_positions=np.flatnonzero(expanded == image_token_id),
        response_rows=starts[is_response] - 1,
    )
    return stream, starts


def _as_bool(plan: npt.ArrayLike | Tensor) -> BoolArray:
    return np.asarray(plan.numpy() if isinstance(plan, Tensor) else plan, dtype=np.bool_)
