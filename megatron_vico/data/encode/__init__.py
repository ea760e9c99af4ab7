"""From a conversation to token ids and tiles."""
