"""Train InternVL3.5 models to choose 64 or 256 visual tokens per tile (ViCO), on megatron-core."""

__version__ = "0.1.0"
