"""megatron-core's distributed checkpoints, a tensor at a time."""
