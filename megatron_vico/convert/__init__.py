"""Checkpoints between Megatron-core and Hugging Face, a tensor at a time."""
