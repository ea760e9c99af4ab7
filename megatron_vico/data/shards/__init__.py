"""Making shards and looking at them, before training; nothing that trains needs it."""
