"""One table of names, both directions."""
