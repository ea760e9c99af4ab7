"""What a conversion is told; nothing here imports torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from tyro.conf import Suppress, arg

from megatron_vico.errors import ConfigError

Layout = Literal["internvl", "hf", "flash"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

MAX_SHARD_BYTES = 5_000_000_000
"""Size of a safetensors file above which a checkpoint is cut into several, as transformers does."""


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """What a conversion does beyond its two folders; flags of `vico convert`."""

    model_size: str | None = None
    """Refuse any other than this preset or config.json; unset, what the input says it is."""

    ckpt_step: int | None = None
    """With --from megatron: the run's step to take; unset, the latest."""

    dtype: Literal["fp32", "bf16"] | None = None
    """Of the weights; unset, each tensor keeps its own."""

    tokenizer_model: Path | None = None
    """To put beside the weights; unset, the input's."""

    seed: int = 1234
    """Of connectors and ViR where the input of --to megatron has none; see convert/initial.py."""

    max_shard_bytes: int = MAX_SHARD_BYTES
    """Size above which a new file begins; processes share a Hugging Face output file by file."""

    verify: bool = False
    """Read the output back and compare every bit of it."""

    tensor_model_parallel_size: Annotated[int, arg(metavar="N")] = 1
    """With --to megatron: pad the vocabulary as for this size; runs of other sizes load it all the
    same."""

    input_layout: Suppress[Layout | None] = None
    """A Hugging Face input in another layout is refused; unset, any will do."""

    progress: Suppress[Literal["none", "bar"]] = "none"
    """Whether the main process shows bytes and time left."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: if a number is out of range."""
        if self.tensor_model_parallel_size < 1:
            raise ConfigError(
                f"--tensor-model-parallel-size {self.tensor_model_parallel_size}: expected 1 or"
                " more."
            )
        if self.max_shard_bytes < 1:
            raise ConfigError(
                f"--max-shard-bytes {self.max_shard_bytes}: expected 1 or more; 5000000000 is"
                " usual."
            )
