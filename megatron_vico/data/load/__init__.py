"""Packs, read and prepared ahead by worker processes."""
