"""What `vico shards make` can be told."""

import os
from dataclasses import dataclass

from tyro.conf import Suppress

from megatron_vico.errors import ConfigError


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, kw_only=True)
class FrameOptions:
    """Which frames of a video are taken, together with its sample's key; official names."""

    seed: int = 1234
    """Of the frames that are taken from videos."""

    min_num_frame: int = 8
    """Fewest frames of a video."""

    max_num_frame: int = 32
    """Most frames of a video."""


@dataclass(frozen=True, kw_only=True)
class WriterOptions(FrameOptions):
    """How shards are cut, what happens to broken samples, and how many processes do it."""

    samples_per_shard: int = 10_000
    """Lines that become a shard; the unit of work, so give fewer if there are more workers than
    shards."""

    max_shard_bytes: int = 1 << 30
    """Where a shard goes on in another file."""

    max_skipped: int = 0
    """Broken samples to leave out."""

    max_skipped_share: float = 0.0
    """The same as a share of all samples, such as 0.01; the larger limit holds."""

    seq_length: int | None = None
    """Leave out samples with more tokens, uncompressed, as broken ones; unset, none: training
    refuses shards that hold any."""

    max_tiles_per_pack: int | None = None
    """Leave out samples with more tiles, as broken ones; unset, none."""

    allow_outside_root: bool = False
    """Read media also where paths or links lead out of the data's root."""

    tokens_kept: Suppress[int] = 256
    """Visual tokens of a tile that is not compressed, for --seq-length."""

    num_workers: Suppress[int] = 1
    show_progress: Suppress[bool] = True

    def __post_init__(self) -> None:
        """Raises: ConfigError: if a number is out of range."""
        for name, value, minimum in (
            ("--samples-per-shard", self.samples_per_shard, 1),
            ("--max-shard-bytes", self.max_shard_bytes, 1),
            ("--max-skipped", self.max_skipped, 0),
            ("--workers", self.num_workers, 1),
            ("--min-num-frame", self.min_num_frame, 1),
            ("--max-num-frame", self.max_num_frame, self.min_num_frame),
            ("--seq-length", self.seq_length, 1),
            ("--max-tiles-per-pack", self.max_tiles_per_pack, 1),
        ):
            if value is not None and value < minimum:
                raise ConfigError(f"{name} {value}: expected at least {minimum}.")
        if not 0 <= self.max_skipped_share <= 1:
            raise ConfigError(
                f"--max-skipped-share {self.max_skipped_share}: expected a share from 0 to 1."
            )

    def skip_limit(self, num_samples: int) -> int:
        """How many of `num_samples` may be left out."""
        return max(self.max_skipped, int(self.max_skipped_share * num_samples))
