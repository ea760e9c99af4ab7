"""Making, checking and picturing shards; training never imports it."""
