"""The order in which an epoch takes its samples: a pure function of (shards, repeats, seed, epoch).

Shards are shuffled, and then samples inside blocks of some shards, so that a reader has few shards
open at a time and an epoch is put in order block by block, as it is read. Random numbers are a
counter-based generator's raw output, which NumPy keeps fixed over versions (unlike
`Generator.permutation`).
"""

import functools
import hashlib
import math
from collections.abc import Sequence

import numpy as np

from megatron_vico.data.samples import IntArray

SHARE_BITS = 31
"""Fractional repeats are multiples of 2^-31, so that parts are counted in integers (below 2^31
samples a folder)."""


class EpochOrder:
    """The samples of one epoch in order, each with its visit: how often it came before in the run.

    A folder with repeat r comes floor(r) times, and then the rest of r as a random part of each of
    its shards, another part each epoch. A sample's visit is epoch * ceil(r) + copy.
    """

    def __init__(
        self,
        samples_per_shard: Sequence[Sequence[int]],
        *,
        repeats: Sequence[float],
        seed: int,
        epoch: int,
        block_shards: int,
    ) -> None:
        """Work out the blocks; samples are put in order when they are asked for.

        Args:
            samples_per_shard: of each folder; samples are numbered in this order.
            repeats: how often each folder comes in an epoch, > 0.
            block_shards: shards whose samples are shuffled together.
        """
        self._key = f"{seed}/{epoch}"
        starts = np.cumsum([0, *(sum(sizes) for sizes in samples_per_shard)])
        copies = []
        for folder, (sizes, repeat) in enumerate(zip(samples_per_shard, repeats, strict=True)):
            key = f"{self._key}/folder/{folder}"
            copies += _copies(starts[folder], sizes, repeat=repeat, epoch=epoch, key=key)
        # Columns: first sample, samples, taken, visit.
        shards = np.concatenate([np.zeros((0, 4), np.int64), *copies])
        num_blocks = math.ceil(len(shards) / block_shards)
        # One block is all shards: shuffling them first would only change which permutation it is.
        shuffled = (
            _permutation(len(shards), key=f"{self._key}/shards")
            if num_blocks > 1
            else np.arange(len(shards))
        )
        self._blocks = [
            shards[np.sort(shuffled[block * block_shards : (block + 1) * block_shards])]
            for block in range(num_blocks)
        ]
        self._block_starts = np.cumsum([0, *(int(block[:, 2].sum()) for block in self._blocks)])
        self._block = functools.lru_cache(maxsize=1)(self._shuffle_block)

    def __len__(self) -> int:
        return int(self._block_starts[-1])

    def slice(self, start: int, stop: int) -> tuple[IntArray, IntArray]:
        """Numbers and visits, [stop - start] int64 each, of some samples of the epoch.

        Those beyond its end are left out. Cheap in ascending order.
        """
        first = int(np.searchsorted(self._block_starts, start, side="right")) - 1
        end = int(np.searchsorted(self._block_starts, min(stop, len(self)), side="left"))
        parts = [
            self._block(block)[:, max(start - offset, 0) : max(stop - offset, 0)]
            for block, offset in zip(
                range(first, end), self._block_starts[first:end].tolist(), strict=True
            )
        ]
        ids, visits = np.concatenate([np.zeros((2, 0), np.int64), *parts], axis=1)
        return ids, visits

    def _shuffle_block(self, block: int) -> IntArray:
        """[2, samples of the block]: numbers and visits."""
        columns = [
            np.stack([first + self._part(first, size, taken), np.full(taken, visit)])
            for first, size, taken, visit in self._blocks[block].tolist()
        ]
        together: IntArray = np.concatenate(columns, axis=1)
        return together[:, _permutation(together.shape[1], key=f"{self._key}/order", block=block)]

    def _part(self, first: int, size: int, taken: int) -> IntArray:
        """Which samples of a shard are taken."""
        if taken == size:
            return np.arange(size)
        return np.sort(_permutation(size, key=f"{self._key}/part/{first}")[:taken])


def _copies(
    first: int, sizes: Sequence[int], *, repeat: float, epoch: int, key: str
) -> list[IntArray]:
    """For each copy of a folder its shards: [shards, 4] first sample, samples, taken, visit."""
    ends = np.cumsum([0, *sizes])
    num_whole, share = int(repeat), round(repeat % 1 * 2**SHARE_BITS)
    # The random offset rounds each shard's part, and the folder's, up or down so that the mean over
    # epochs is exact.
    offset = int(_draws(1, key=key)[0] >> np.uint64(64 - SHARE_BITS))
    part = np.diff((ends * share + offset) >> SHARE_BITS)
    copies = []
    for copy in range(math.ceil(repeat)):
        taken = np.array(sizes, dtype=np.int64) if copy < num_whole else part
        visits = np.full(len(sizes), epoch * math.ceil(repeat) + copy)
        columns = np.stack([first + ends[:-1], sizes, taken, visits], axis=1)
        copies.append(columns[taken > 0])
    return copies


def _permutation(size: int, *, key: str, block: int = 0) -> IntArray:
    """[size] int64, a random permutation that depends on nothing but its arguments."""
    return np.argsort(_draws(size, key=key, block=block), kind="stable").astype(np.int64)


def _draws(size: int, *, key: str, block: int = 0) -> np.ndarray:
    """[size] uint64; blocks of one key own the counter's upper half, so that they never overlap."""
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    philox = np.random.Philox(key=int.from_bytes(digest, "little"), counter=block << 128)
    return philox.random_raw(size)
