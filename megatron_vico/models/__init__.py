"""InternVL3.5 and InternVL3.5-Flash modules on megatron-core."""
