"""Which tokens of a pack each context-parallel rank holds: TransformerEngine's layout for thd.

Each document is cut into 2 * CP equal chunks, and rank r holds chunks r and 2 * CP - 1 - r of every
document, in this order, one document after the other. A chunk from the front and one from the back
together see as many tokens on every rank, so that causal attention costs all ranks the same.

Shapes: T packed tokens, D documents, C context-parallel ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def zigzag_positions(document_lens: Sequence[int], *, cp_size: int, cp_rank: int) -> Tensor:
    """Where in the pack this rank's tokens are, [T / C] int64, in the order in which it holds them.

    Over all ranks, each position of the pack comes once.

    Raises:
        ValueError: if a document, padding included, does not divide into 2 * cp_size chunks.
    """
    if cp_size == 1:
        return torch.arange(sum(document_lens))
    for index, length in enumerate(document_lens):
        if length % (2 * cp_size):
            raise ValueError(
                f"document {index} of a pack has {length} tokens, expected a multiple of"
                f" {2 * cp_size} (2 * context-parallel size {cp_size}); pad each document before"
                " the pack is split."
            )
    lens_D = torch.tensor(document_lens, dtype=torch.int64)
    chunk_lens_D = lens_D // (2 * cp_size)
    starts_D = lens_D.cumsum(0) - lens_D
    begins_D2 = starts_D[:, None] + chunk_lens_D[:, None] * torch.tensor(
        [cp_rank, 2 * cp_size - 1 - cp_rank]
    )
    lens = chunk_lens_D.repeat_interleave(2)
    # Where a chunk begins in the pack less where it begins here, added to where a token is here.
    shifts = begins_D2.flatten() - (lens.cumsum(0) - lens)
    return torch.arange(int(lens.sum())) + shifts.repeat_interleave(lens)
