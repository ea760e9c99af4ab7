"""What `vico shards make` can be told: the fields with a help text are its flags."""

import os
from dataclasses import dataclass, field

from megatron_vico.errors import ConfigError


def _flag[T](default: T, help_text: str) -> T:
    return field(default=default, metadata={"help": help_text})


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, kw_only=True)
class FrameOptions:
    """Which frames of a video are taken, together with its sample's key; official names."""

    seed: int = _flag(1234, "of the frames that are taken from videos")
    min_num_frame: int = _flag(8, "fewest frames of a video")
    max_num_frame: int = _flag(32, "most frames of a video")


@dataclass(frozen=True, kw_only=True)
class WriterOptions(FrameOptions):
    """How shards are cut, what happens to broken samples, and how many processes do it."""

    samples_per_shard: int = _flag(
        10_000,
        "lines that become a shard; the unit of work, so give fewer if there are more workers than"
        " shards",
    )
    max_shard_bytes: int = _flag(1 << 30, "where a shard goes on in another file")
    max_skipped: int = _flag(0, "broken samples to leave out")
    max_skipped_share: float = _flag(
        0.0, "the same as a share of all samples, such as 0.01; the larger limit holds"
    )
    num_workers: int = 1
    show_progress: bool = True

    def __post_init__(self) -> None:
        """Raises: ConfigError: if a number is out of range."""
        for name, value, minimum in (
            ("--samples-per-shard", self.samples_per_shard, 1),
            ("--max-shard-bytes", self.max_shard_bytes, 1),
            ("--max-skipped", self.max_skipped, 0),
            ("--workers", self.num_workers, 1),
            ("--min-num-frame", self.min_num_frame, 1),
            ("--max-num-frame", self.max_num_frame, self.min_num_frame),
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
