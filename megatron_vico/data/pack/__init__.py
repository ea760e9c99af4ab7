"""Which samples share a pack, and when: pure functions of seed and index."""
