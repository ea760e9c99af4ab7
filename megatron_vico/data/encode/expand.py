"""Where a compression plan meets the text: each tile's one image token becomes its visual tokens.

Everything that depends on positions (where visual tokens go, which hidden states predict responses)
is computed here, once, so that the reference and the policy stream cannot drift apart.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_vico.data.samples import EncodedSample, PackedStream
from megatron_vico.errors import SampleError


def expand(
    samples: Sequence[EncodedSample],
    *,
    plan: Tensor,
    tokens_kept: int,
    tokens_compressed: int,
    image_token_id: int,
) -> PackedStream:
    """The stream of a pack's samples under one compression plan.

    The plan, [N] bool over all tiles of all samples, is True where a tile is compressed;
    SampleError if it is for another number of tiles.
    """
    num_tiles = sum(sample.num_tiles for sample in samples)
    if plan.shape != (num_tiles,):
        keys = ", ".join(repr(sample.key) for sample in samples)
        raise SampleError(f"sample {keys}: a plan for {len(plan)} tiles but {num_tiles} tiles.")
    token_ids = np.concatenate([sample.token_ids for sample in samples])
    is_response = np.concatenate([sample.is_response for sample in samples])
    repeats = np.ones(token_ids.size, dtype=np.int64)
    repeats[token_ids == image_token_id] = np.where(plan.numpy(), tokens_compressed, tokens_kept)
    # Where each token starts in the stream, and at the end the stream's length.
    starts = np.concatenate([[0], np.cumsum(repeats)])
    expanded = np.repeat(token_ids, repeats)
    lens = [sample.token_ids.size for sample in samples]
    return PackedStream(
        compressed=plan,
        token_ids=torch.from_numpy(expanded),
        cu_seqlens=torch.from_numpy(starts[np.cumsum([0, *lens])].astype(np.int32)),
        visual_positions=torch.from_numpy(np.flatnonzero(expanded == image_token_id)),
        response_rows=torch.from_numpy(starts[:-1][is_response] - 1),
    )
