"""Names and files of checkpoints: Hugging Face layouts and Megatron's sharded state."""
