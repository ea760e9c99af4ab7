"""From shards to packed batches, on the CPU; pure functions on typed samples."""
