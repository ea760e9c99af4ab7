"""What `vico shards make` can be told; light to import, for the command line reads its defaults."""

import os
from dataclasses import dataclass, field

from megatron_vico.errors import ConfigError


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, kw_only=True)
class FrameOptions:
    """Which frames of a video are taken."""

    seed: int = 1234
    """Of the number and the places of frames, together with the sample's key."""

    min_num_frame: int = 8
    """Fewest frames of a video (the official name)."""

    max_num_frame: int = 32
    """Most frames of a video (the official name)."""


@dataclass(frozen=True, kw_only=True)
class WriterOptions:
    """How shards are cut, what happens to broken samples, and how many processes do it."""

    samples_per_shard: int = 10_000
    """Lines that become one shard; also the unit of work, and what a kill can lose of it."""

    max_shard_bytes: int = 1 << 30
    """A tar file is closed once it has this many bytes, and its lines go on in another."""

    max_skipped: int = 0
    """Broken samples that may be left out, over all data sets, each logged in the index."""

    max_skipped_share: float = 0.0
    """The same as a share of all samples, in [0, 1]; the larger of the two limits holds."""

    frames: FrameOptions = field(default_factory=FrameOptions)
    num_workers: int = 1
    show_progress: bool = True

    def __post_init__(self) -> None:
        """Raises: ConfigError: if a number is out of range."""
        frames = self.frames
        for name, value, minimum in (
            ("--samples-per-shard", self.samples_per_shard, 1),
            ("--max-shard-bytes", self.max_shard_bytes, 1),
            ("--max-skipped", self.max_skipped, 0),
            ("--workers", self.num_workers, 1),
            ("--min-num-frame", frames.min_num_frame, 1),
            ("--max-num-frame", frames.max_num_frame, frames.min_num_frame),
        ):
            if value < minimum:
                raise ConfigError(f"{name} {value}: expected at least {minimum}.")
        if not 0 <= self.max_skipped_share <= 1:
            raise ConfigError(
                f"--max-skipped-share {self.max_skipped_share}: expected a share from 0 to 1."
            )

    def skip_limit(self, num_samples: int) -> int:
        """How many of `num_samples` may be left out."""
        return max(self.max_skipped, int(self.max_skipped_share * num_samples))
